"""The interpreter of Core ML packages: every operation against numpy, every form of a constant
against coremltools' own decompression, and packages that no stranger should get away with."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hostile_packages
import numpy as np
import pytest
import torch
from hostile_packages import MODEL, WEIGHTS

from export.coreml.constants import FORMS
from export.coreml.interpreter import Program, open_package
from export.coreml.operations import OPERATIONS
from export.problem import Problem

with contextlib.redirect_stderr(io.StringIO()):  # it tells what it lacks outside macOS
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

SIZES = {"x": (2, 3, 4, 6), "y": (2, 3, 4, 6), "ids": (5,), "at": (1,)}
DTYPES = {"fp16": types.fp16, "fp32": types.fp32}


def write(path: Path, inputs: list, build: Callable, target: str = "iOS17") -> Path:
    """A package of a program as it is built: without coremltools' passes, which improve it."""
    opset = getattr(ct.target, target)
    with contextlib.redirect_stderr(io.StringIO()):
        model = ct.convert(
            Builder.program(input_specs=inputs, opset_version=opset)(build),
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    model.save(str(path))
    return path


def tensor(shape, dtype=types.fp16):
    return Builder.TensorSpec(shape, dtype=dtype)


# ----------------------------------------------------------------------- operations against numpy


def drawn(rng: np.random.Generator) -> SimpleNamespace:
    """Numbers that float16 holds exactly, so that both precisions compute with the same ones."""

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    result = {name: floats(*SIZES[name]) for name in "xy"}
    result |= {"ids": rng.integers(0, 9, 5, np.int32), "at": rng.integers(0, 4, 1, np.int32)}
    return SimpleNamespace(
        **result,
        w=floats(7, 6),
        b=floats(7),
        table=floats(9, 3),
        kernel=floats(5, 3, 3, 1),
        depthwise=floats(6, 1, 3),
        gamma=floats(6),
        channel=floats(3),
        patch=floats(2, 3, 1, 6),
    )


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def normalised(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A kernel of 3 rows, stride 2, one row of padding before and two after."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 0)))
    rows = range(0, x.shape[2] - 2, 2)
    return np.stack([np.einsum("nchw,dch->ndw", x[:, :, i : i + 3], kernel) for i in rows], 2)


def updated(x: np.ndarray, at: int, patch: np.ndarray) -> np.ndarray:
    y = x.copy()
    y[:, :, at : at + 1] = patch
    return y


def binary(kind: str, want: Callable) -> tuple[Callable, Callable]:
    return lambda b, v, n: getattr(b, kind)(x=v.x, y=v.y), lambda n: want(n.x, n.y)


def comparison(kind: str, want: Callable) -> tuple[Callable, Callable]:
    def build(b, v, n):
        return b.cast(x=getattr(b, kind)(x=v.ids, y=np.int32(4)), dtype="int32")

    return build, lambda n: want(n.ids, 4)


def logical(kind: str, want: Callable) -> tuple[Callable, Callable]:
    def build(b, v, n):
        result = getattr(b, kind)(
            x=b.greater(x=v.x, y=v.y), y=b.less(x=v.x, y=n.gamma.astype(n.dtype))
        )
        return b.cast(x=result, dtype="int32")

    return build, lambda n: want(n.x > n.y, n.x < n.gamma)


def unary(kind: str, want: Callable) -> tuple[Callable, Callable]:
    return lambda b, v, n: getattr(b, kind)(x=v.x), lambda n: want(n.x)


def positive(kind: str, want: Callable, **more: float) -> tuple[Callable, Callable]:
    def build(b, v, n):
        floats = {key: n.dtype(value) for key, value in more.items()}
        return getattr(b, kind)(x=b.abs(x=v.x), **floats)

    return build, lambda n: want(np.abs(n.x))


def reduction(kind: str, want: Callable) -> tuple[Callable, Callable]:
    return (
        lambda b, v, n: getattr(b, kind)(x=v.x, axes=[1, -1], keep_dims=True),
        lambda n: want(n.x, (1, 3), keepdims=True),
    )


CASES: dict[str, tuple[Callable, Callable]] = {
    "linear": (
        lambda b, v, n: b.linear(x=v.x, weight=n.w.astype(n.dtype), bias=n.b.astype(n.dtype)),
        lambda n: n.x @ n.w.T + n.b,
    ),
    "matmul": (
        lambda b, v, n: b.matmul(x=v.x, y=v.y, transpose_y=True),
        lambda n: n.x @ n.y.swapaxes(2, 3),
    ),
    "matmul_transposed": (
        lambda b, v, n: b.matmul(x=v.x, y=v.y, transpose_x=True),
        lambda n: n.x.swapaxes(2, 3) @ n.y,
    ),
    "einsum": (
        lambda b, v, n: b.einsum(
            values=[v.x, b.transpose(x=v.y, perm=[0, 3, 2, 1])], equation="nchw,nwhu->nchu"
        ),
        lambda n: np.einsum("nchw,nuhw->nchu", n.x, n.y),
    ),
    "conv_2d": (
        lambda b, v, n: b.conv(
            x=v.x,
            weight=n.kernel.astype(n.dtype),
            strides=[2, 1],
            pad_type="custom",
            pad=[1, 2, 0, 0],
        ),
        lambda n: convolved(n.x, n.kernel[..., 0]),
    ),
    "conv_1x1": (
        lambda b, v, n: b.conv(
            x=b.transpose(x=v.x, perm=[0, 3, 1, 2]),
            weight=n.w.astype(n.dtype)[:, :, None, None],
            bias=n.b.astype(n.dtype),
        ),
        lambda n: (n.x @ n.w.T + n.b).transpose(0, 3, 1, 2),
    ),
    "conv_1d_grouped": (
        lambda b, v, n: b.conv(
            x=b.reshape(x=v.x, shape=[4, 6, 6]),
            weight=n.depthwise.astype(n.dtype),
            pad_type="custom",
            pad=[2, 2],
            dilations=[2],
            groups=6,
        ),
        lambda n: sum(
            np.pad(n.x.reshape(4, 6, 6), ((0, 0), (0, 0), (2, 2)))[:, :, 2 * i : 2 * i + 6]
            * n.depthwise[:, 0, i, None]
            for i in range(3)
        ),
    ),
    "log": positive("log", lambda x: np.log(x + 0.25), epsilon=0.25),
    "rsqrt": positive("rsqrt", lambda x: 1 / np.sqrt(x + 0.25), epsilon=0.25),
    "inverse": positive("inverse", lambda x: 1 / (x + 0.25), epsilon=0.25),
    "sqrt": positive("sqrt", np.sqrt),
    "clip": (
        lambda b, v, n: b.clip(x=v.x, alpha=n.dtype(-0.5), beta=n.dtype(0.75)),
        lambda n: n.x.clip(-0.5, 0.75),
    ),
    "select": (
        lambda b, v, n: b.select(cond=b.greater(x=v.x, y=v.y), a=v.x, b=v.y),
        lambda n: np.maximum(n.x, n.y),
    ),
    "gelu": (
        lambda b, v, n: b.gelu(x=v.x),
        lambda n: 0.5 * n.x * (1 + erf(n.x / math.sqrt(2))),
    ),
    "gelu_tanh": (
        lambda b, v, n: b.gelu(x=v.x, mode="TANH_APPROXIMATION"),
        lambda n: 0.5 * n.x * (1 + np.tanh(math.sqrt(2 / math.pi) * (n.x + 0.044715 * n.x**3))),
    ),
    "gelu_sigmoid": (
        lambda b, v, n: b.gelu(x=v.x, mode="SIGMOID_APPROXIMATION"),
        lambda n: n.x / (1 + np.exp(-1.702 * n.x)),
    ),
    "cast": (
        lambda b, v, n: b.cast(x=b.mul(x=v.x, y=n.dtype(8)), dtype="int32"),
        lambda n: np.trunc(n.x * 8),
    ),
    "softmax": (lambda b, v, n: b.softmax(x=v.x, axis=1), lambda n: softmax(n.x, 1)),
    "layer_norm": (
        lambda b, v, n: b.layer_norm(
            x=v.x,
            axes=[-1],
            gamma=n.gamma.astype(n.dtype),
            beta=n.b[:6].astype(n.dtype),
            epsilon=n.dtype(2**-10),
        ),
        lambda n: normalised(n.x, (3,), 2**-10) * n.gamma + n.b[:6],
    ),
    "layer_norm_of_channels": (
        lambda b, v, n: b.layer_norm(
            x=v.x, axes=[1], gamma=n.channel.astype(n.dtype), epsilon=n.dtype(2**-10)
        ),
        lambda n: normalised(n.x, (1,), 2**-10) * n.channel[:, None, None],
    ),
    "reduce_argmax": (
        lambda b, v, n: b.reduce_argmax(x=v.x, axis=-1),
        lambda n: n.x.argmax(-1),
    ),
    "cumsum": (
        lambda b, v, n: b.cumsum(x=v.ids, axis=0, exclusive=True, reverse=True),
        lambda n: n.ids[::-1].cumsum()[::-1] - n.ids,
    ),
    "transpose": (
        lambda b, v, n: b.transpose(x=v.x, perm=[0, -1, 1, 2]),
        lambda n: n.x.transpose(0, 3, 1, 2),
    ),
    "reshape": (
        lambda b, v, n: b.reshape(x=v.x, shape=[0, -1, 2, 0]),
        lambda n: n.x.reshape(2, 6, 2, 6),
    ),
    "expand_dims": (
        lambda b, v, n: b.expand_dims(x=b.reshape(x=v.x, shape=[12, 12]), axes=[-1, 0, 2]),
        lambda n: n.x.reshape(1, 12, 1, 12, 1),
    ),
    "squeeze": (
        lambda b, v, n: b.squeeze(x=b.reshape(x=v.x, shape=[1, 144, 1]), axes=[0]),
        lambda n: n.x.reshape(144, 1),
    ),
    "concat": (
        lambda b, v, n: b.concat(values=[v.y, v.x, v.y], axis=-2),
        lambda n: np.concatenate([n.y, n.x, n.y], 2),
    ),
    "stack": (
        lambda b, v, n: b.stack(values=[v.y, v.x], axis=1),
        lambda n: np.stack([n.y, n.x], 1),
    ),
    "split_even": (
        lambda b, v, n: b.concat(values=b.split(x=v.x, num_splits=3, axis=-1)[::-1], axis=-1),
        lambda n: np.concatenate(np.split(n.x, 3, -1)[::-1], -1),
    ),
    "split_uneven": (
        lambda b, v, n: b.concat(values=b.split(x=v.x, split_sizes=[1, 3], axis=2)[::-1], axis=2),
        lambda n: np.roll(n.x, 3, 2),
    ),
    "tile": (
        lambda b, v, n: b.tile(x=v.x, reps=[1, 2, 1, 3]),
        lambda n: np.tile(n.x, (1, 2, 1, 3)),
    ),
    "fill": (
        lambda b, v, n: b.add(x=b.fill(shape=[4, 1], value=n.dtype(0.5)), y=v.x),
        lambda n: n.x + 0.5,
    ),
    "one_hot": (
        lambda b, v, n: b.one_hot(
            indices=v.ids,
            one_hot_vector_size=9,
            axis=0,
            on_value=n.dtype(2),
            off_value=n.dtype(-0.5),
        ),
        lambda n: np.where(np.eye(9)[n.ids].T, 2, -0.5),
    ),
    "gather": (
        lambda b, v, n: b.gather(x=n.table.astype(n.dtype), indices=v.ids, axis=0),
        lambda n: n.table[n.ids],
    ),
    "gather_inside": (
        lambda b, v, n: b.gather(x=v.x, indices=np.int32([[3, 0], [1, 1]]), axis=-2),
        lambda n: n.x[:, :, [[3, 0], [1, 1]]],
    ),
    "pad": (
        lambda b, v, n: b.pad(x=v.x, pad=[1, 0, 2, 3], mode="constant", constant_val=n.dtype(0.5)),
        lambda n: np.pad(n.x, ((0, 0), (0, 0), (1, 0), (2, 3)), constant_values=0.5),
    ),
    "pad_reflect": (
        lambda b, v, n: b.pad(x=v.x, pad=[0, 0, 0, 0, 0, 0, 5, 4], mode="reflect"),
        lambda n: np.pad(n.x, ((0, 0), (0, 0), (0, 0), (5, 4)), "reflect"),
    ),
    "pad_replicate": (
        lambda b, v, n: b.pad(x=v.x, pad=[1, 2, 3, 0], mode="replicate"),
        lambda n: np.pad(n.x, ((0, 0), (0, 0), (1, 2), (3, 0)), "edge"),
    ),
    "slice_by_index": (
        lambda b, v, n: b.slice_by_index(
            x=v.x,
            begin=[1, 0, 1, -5],
            end=[2, 0, 4, -1],
            stride=[1, 1, 2, 2],
            end_mask=[False, True, False, False],
            squeeze_mask=[True, False, False, False],
        ),
        lambda n: n.x[1, :, 1:4:2, -5:-1:2],
    ),
    "slice_from_the_start": (
        lambda b, v, n: b.slice_by_index(
            x=v.x, begin=[7, 7, 7, 7], end=[2, 2, 3, 4], begin_mask=[True] * 4
        ),
        lambda n: n.x[:2, :2, :3, :4],
    ),
    "slice_by_size": (
        lambda b, v, n: b.slice_by_size(x=v.x, begin=[0, 1, 2, 3], size=[-1, 1, 2, -1]),
        lambda n: n.x[:, 1:2, 2:4, 3:],
    ),
    "abs": unary("abs", np.abs),
    "cos": unary("cos", np.cos),
    "erf": unary("erf", erf),
    "exp": unary("exp", np.exp),
    "relu": unary("relu", lambda x: x.clip(0)),
    "sigmoid": unary("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    "silu": unary("silu", lambda x: x / (1 + np.exp(-x))),
    "sin": unary("sin", np.sin),
    "square": unary("square", np.square),
    "tanh": unary("tanh", np.tanh),
    "add": binary("add", np.add),
    "maximum": binary("maximum", np.maximum),
    "minimum": binary("minimum", np.minimum),
    "mul": binary("mul", np.multiply),
    "real_div": binary("real_div", np.divide),
    "sub": binary("sub", np.subtract),
    "pow": (lambda b, v, n: b.pow(x=v.x, y=n.dtype(2)), lambda n: n.x**2),
    "equal": comparison("equal", np.equal),
    "greater": comparison("greater", np.greater),
    "greater_equal": comparison("greater_equal", np.greater_equal),
    "less": comparison("less", np.less),
    "less_equal": comparison("less_equal", np.less_equal),
    "not_equal": comparison("not_equal", np.not_equal),
    "logical_and": logical("logical_and", np.logical_and),
    "logical_or": logical("logical_or", np.logical_or),
    "logical_xor": logical("logical_xor", np.logical_xor),
    "logical_not": (
        lambda b, v, n: b.cast(x=b.logical_not(x=b.less(x=v.x, y=v.y)), dtype="int32"),
        lambda n: n.x >= n.y,
    ),
    "reduce_max": reduction("reduce_max", np.max),
    "reduce_mean": reduction("reduce_mean", np.mean),
    "reduce_min": reduction("reduce_min", np.min),
    "reduce_sum": reduction("reduce_sum", np.sum),
}
CASES_18: dict[str, tuple[Callable, Callable]] = {
    "attention": (
        lambda b, v, n: b.scaled_dot_product_attention(
            query=v.x,
            key=v.y,
            value=v.x,
            attn_mask=n.table[:4, :1].astype(n.dtype) * n.dtype(1) + np.zeros((4, 4), n.dtype),
        ),
        lambda n: softmax(n.x @ n.y.swapaxes(2, 3) / math.sqrt(6) + n.table[:4, :1]) @ n.x,
    ),
    "slice_update": (
        lambda b, v, n: b.slice_update(
            x=v.x,
            update=n.patch.astype(n.dtype),
            begin=b.concat(values=[np.int32([0, 0]), v.at, np.int32([0])], axis=0),
            end=b.concat(
                values=[np.int32([2, 3]), b.add(x=v.at, y=np.int32(1)), np.int32([6])], axis=0
            ),
        ),
        lambda n: updated(n.x, int(n.at[0]), n.patch),
    ),
}


def one_program(folder: Path, cases: dict, target: str, precision: str, numbers) -> Program:
    """All cases as outputs of one program."""
    floats = DTYPES[precision]
    numbers.dtype = types.nptype_from_builtin(floats)

    def build(x, y, ids, at):
        v = SimpleNamespace(x=x, y=y, ids=ids, at=at)
        results = {name: case[0](Builder, v, numbers) for name, case in cases.items()}
        return tuple(Builder.identity(x=x, name=f"{name}_") for name, x in results.items())

    kinds = {name: floats if name in "xy" else types.int32 for name in SIZES}
    inputs = [tensor(SIZES[name], kind) for name, kind in kinds.items()]
    return open_package(write(folder / f"{target}-{precision}.mlpackage", inputs, build, target))


@pytest.fixture(scope="module")
def results(tmp_path_factory, module_seed) -> dict[str, tuple]:
    """Return the results of every case: in float32, in float16, and numpy's."""
    folder, rng = tmp_path_factory.mktemp("operations"), np.random.default_rng(module_seed)
    result = {}
    for target, cases in (("iOS17", CASES), ("iOS18", CASES_18)):
        numbers = drawn(rng)
        feed = {name: getattr(numbers, name) for name in SIZES}
        single, half = (
            one_program(folder, cases, target, precision, numbers).predict(feed)
            for precision in ("fp32", "fp16")
        )
        exact = {
            k: v.astype(np.float64) if v.dtype == np.float16 else v
            for k, v in vars(numbers).items()
            if isinstance(v, np.ndarray)
        }
        for name, (_, want) in cases.items():
            key = f"{name}_"
            result[name] = single[key], half[key], np.asarray(want(SimpleNamespace(**exact)))
    return result


@pytest.mark.parametrize("case", [*CASES, *CASES_18])
def test_operations_match_numpy(case, results):
    single, half, want = results[case]
    assert single.shape == half.shape == want.shape
    assert np.allclose(single, want, rtol=2e-5, atol=2e-5)
    assert half.dtype == (np.float16 if single.dtype == np.float32 else np.int32)
    assert np.array_equal(half, single.astype(half.dtype)), "rounded once, from float32"


def test_every_supported_operation_is_tested():
    tested = {name.split("_of_")[0] for name in (*CASES, *CASES_18)}
    other = {"conv", "split", "identity", "read_state", "write_state"}
    assert OPERATIONS.keys() - tested - other <= {"scaled_dot_product_attention"}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda x: Builder.reverse(x=x, axes=[0]), r"unsupported operations: reverse \(1 times\)"),
        (
            lambda x: Builder.gather(x=x, indices=np.int32([[0], [1]]), axis=1, batch_dims=1),
            r"\(gather\): batch_dims is 1, supported: 0",
        ),
        (
            lambda x: Builder.conv(x=x, weight=np.ones((1, 3, 3), np.float16), pad_type="same"),
            r"\(conv\): pad_type is 'same', supported: valid, custom",
        ),
        (
            lambda x: Builder.concat(values=[x, x], axis=1, interleave=True),
            r"\(concat\): interleave is True, supported: False",
        ),
        (
            lambda x: Builder.reshape(x=x, shape=[0, 8]),
            r"\(reshape\): shape \[0, 8\] keeps sizes",
        ),
    ],
    ids=["operation", "batches", "padding", "interleaved", "kept_sizes"],
)
def test_unsupported_operations_and_modes_are_refused_by_name(build, message, tmp_path):
    path = write(tmp_path / "unknown.mlpackage", [tensor((2, 3, 4))], build)
    with pytest.raises(Problem, match=message) as caught:
        open_package(path)
    assert "run the package on a Mac" in caught.value.hint


# -------------------------------------------------------------------------- compressed constants


def packed(bits: int, values: np.ndarray) -> np.ndarray:
    """As the forms for iOS 16 hold them: the least significant bits first."""
    single = (values.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(single.astype(np.uint8), bitorder="little")


def masked(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, int]:
    mask = rng.integers(0, 2, shape).astype(np.uint8)
    mask.reshape(-1)[:3] = 1  # never empty
    return mask, int(mask.sum())


def forms_16(rng: np.random.Generator) -> dict[str, Callable]:
    """(24, 20) in every form of iOS 16; codes are any."""
    shape, b = np.array([24, 20], np.uint32), Builder

    def codes(dtype: type) -> np.ndarray:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, (24, 20), dtype, endpoint=True)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    def table(bits: int) -> Callable:
        indices = packed(bits, rng.integers(0, 2**bits, 480))
        lut = floats(2**bits)
        return lambda: b.constexpr_lut_to_dense(indices=indices, lut=lut, shape=shape)

    def affine(quantized_data, zero_point, scale, axis) -> Callable:
        return lambda: b.constexpr_affine_dequantize(
            quantized_data=quantized_data, zero_point=zero_point, scale=scale, axis=axis
        )

    mask, count = masked(rng, 480)
    return {
        "affine_int8": affine(codes(np.int8), np.zeros(24, np.int8), floats(24), 0),
        "affine_uint8": affine(codes(np.uint8), codes(np.uint8)[0], floats(20), -1),
        "affine_one_scale": affine(codes(np.int8), np.int8(-7), np.float16(0.01), 0),
        **{f"lut_{bits}": table(bits) for bits in (1, 2, 4, 6, 8)},
        "sparse": lambda: b.constexpr_sparse_to_dense(
            nonzero_data=floats(count), mask=packed(1, mask), shape=shape
        ),
        "cast": lambda: b.cast(
            x=b.constexpr_cast(source_val=floats(24, 20), output_dtype="fp32"), dtype="fp16"
        ),
    }


def forms_18(rng: np.random.Generator) -> dict[str, Callable]:
    """(24, 20) in every form of iOS 18."""
    b = Builder

    def codes(kind: str, *shape: int) -> np.ndarray:
        bits = int(kind.removeprefix("u").removeprefix("int"))
        low = 0 if kind.startswith("u") else -(2 ** (bits - 1))
        dtype = types.nptype_from_builtin(types.string_to_builtin(kind))
        return rng.integers(low, low + 2**bits, shape).astype(dtype)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    def blocks(kind: str, *groups: int, offset: bool = False) -> Callable:
        given = {"data": codes(kind, 24, 20), "scale": floats(*groups)}
        given |= {"offset": codes(kind, *groups)} if offset else {}
        return lambda: b.constexpr_blockwise_shift_scale(**given)

    def table(kind: str, *groups: int) -> Callable:
        count = 2 ** int(kind.removeprefix("uint"))
        indices, lut = codes(kind, 24, 20), floats(*groups, count, 1)
        return lambda: b.constexpr_lut_to_dense(indices=indices, lut=lut)

    def vectors(axis: int, shape: tuple[int, ...], *groups: int) -> Callable:
        indices, lut = codes("uint2", *shape), floats(*groups, 4, 4)
        return lambda: b.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=axis)

    def one_bit(mask: np.ndarray) -> np.ndarray:
        return mask.astype(types.nptype_from_builtin(types.uint1))

    mask, count = masked(rng, 24, 20)
    small, few = masked(rng, 6, 20)

    def sparse() -> object:
        return b.constexpr_sparse_to_dense(nonzero_data=floats(count), mask=one_bit(mask))

    def sparse_table() -> object:
        there, values = b.constexpr_lut_to_sparse(
            indices_mask=one_bit(mask),
            indices_nonzero_data=codes("uint3", count),
            lut=floats(1, 1, 8, 1),
        )
        return b.constexpr_sparse_to_dense(nonzero_data=values, mask=there)

    def sparse_vectors() -> object:
        there, values = b.constexpr_lut_to_sparse(
            indices_mask=one_bit(small),
            indices_nonzero_data=codes("uint2", few),
            lut=floats(1, 1, 4, 4),
            vector_axis=0,
        )
        return b.constexpr_sparse_to_dense(nonzero_data=values, mask=there)

    def sparse_blocks() -> object:
        there, values = b.constexpr_sparse_blockwise_shift_scale(
            data_mask=one_bit(mask),
            nonzero_data=codes("int8", count),
            scale=floats(24, 1),
            offset=codes("int8", 24, 1),
        )
        return b.constexpr_sparse_to_dense(nonzero_data=values, mask=there)

    def table_of_codes() -> object:
        lut = b.constexpr_blockwise_shift_scale(
            data=codes("int8", 1, 1, 16, 1), scale=floats(1, 1, 1, 1)
        )
        return b.constexpr_lut_to_dense(indices=codes("uint4", 24, 20), lut=lut)

    return {
        "int4_blocks": blocks("int4", 24, 5),
        "int4_blocks_of_both_axes": blocks("int4", 6, 10, offset=True),
        "uint4_blocks": blocks("uint4", 24, 4, offset=True),
        "int8_channels": blocks("int8", 24, 1),
        "uint8_channels": blocks("uint8", 1, 20, offset=True),
        **{f"lut_{bits}_18": table(f"uint{bits}", 1, 1) for bits in (1, 2, 3, 4, 6, 8)},
        "lut_for_groups": table("uint4", 6, 1),
        "lut_for_blocks": table("uint2", 3, 5),
        "lut_of_vectors": vectors(0, (6, 20), 1, 1),
        "lut_of_vectors_along": vectors(-1, (24, 5), 1, 1),
        "lut_of_vectors_for_groups": vectors(0, (6, 20), 3, 5),
        "lut_of_vectors_for_groups_along": vectors(1, (24, 5), 4, 1),
        "sparse_18": sparse,
        "sparse_lut": sparse_table,
        "sparse_vectors": sparse_vectors,
        "sparse_blocks": sparse_blocks,
        "lut_of_int8": table_of_codes,
        "cast_18": lambda: b.cast(
            x=b.constexpr_cast(source_val=floats(24, 20), output_dtype="fp32"), dtype="fp16"
        ),
    }


AFFINE = "constexpr_affine_dequantize"
IN_USE = {
    "iOS16": {AFFINE, *(f"constexpr_{n}" for n in ("lut_to_dense", "sparse_to_dense", "cast"))},
    "iOS18": FORMS.keys() - {AFFINE},
}
FORMS_16, FORMS_18 = (tuple(forms(np.random.default_rng(0))) for forms in (forms_16, forms_18))


def products(forms: dict[str, Callable]) -> Callable:
    return lambda x: tuple(Builder.mul(x=x, y=form(), name=name) for name, form in forms.items())


@pytest.fixture(scope="module")
def weights(tmp_path_factory, module_seed) -> dict[str, tuple]:
    """Products with every compressed constant, and with what coremltools makes of it."""
    folder, rng = tmp_path_factory.mktemp("constants"), np.random.default_rng(module_seed)
    result: dict[str, tuple] = {}
    for target, forms in (("iOS16", forms_16(rng)), ("iOS18", forms_18(rng))):
        path = write(folder / f"{target}.mlpackage", [tensor((24, 20))], products(forms), target)
        plain = folder / f"{target}-plain.mlpackage"
        with contextlib.redirect_stderr(io.StringIO()):
            model = ct.models.MLModel(str(path), skip_model_load=True)
            ct.optimize.coreml.decompress_weights(model).save(str(plain))
        programs = open_package(path), open_package(plain)
        forms_left = [program.operations.keys() & FORMS for program in programs]
        assert forms_left == [IN_USE[target], set()]
        feed = {"x": rng.standard_normal((24, 20))}
        ours, theirs = (program.predict(feed) for program in programs)
        result |= {name: (ours[name], theirs[name]) for name in forms}
    return result


@pytest.mark.parametrize("form", [*FORMS_16, *FORMS_18])
def test_compressed_constants_match_coremltools(form, weights):
    ours, theirs = weights[form]
    assert np.abs(theirs).max() > 0
    assert np.array_equal(ours, theirs)


# ---------------------------------------------------------------------- states, functions, feeds


@pytest.fixture(scope="module")
def remembers(tmp_path_factory) -> Program:
    """Writes a column into a cache at a place known when it runs; gives the whole cache, doubled,
    and the sum of another state that it adds to."""
    inputs = [tensor((1, 4, 1)), tensor((1,), types.int32)]
    inputs += [Builder.StateTensorSpec((1, 4, n), dtype=types.fp16) for n in (8, 1)]

    def build(column, at, cache, total):
        b, zero = Builder, np.int32([0, 0])
        end = b.concat(values=[np.int32([1, 4]), b.add(x=at, y=np.int32(1))], axis=0)
        begin = b.concat(values=[zero, at], axis=0)
        new = b.slice_update(x=b.read_state(input=cache), update=column, begin=begin, end=end)
        again = b.coreml_update_state(state=cache, value=new)
        summed = b.add(x=b.read_state(input=total), y=column)
        summed = b.coreml_update_state(state=total, value=summed)
        return b.mul(x=again, y=np.float16(2), name="doubled"), b.identity(x=summed, name="summed")

    folder = tmp_path_factory.mktemp("states")
    return open_package(write(folder / "states.mlpackage", inputs, build, "iOS18"))


def test_states_last_from_step_to_step(remembers, rng):
    state = remembers.new_state()
    cache, total = np.zeros((1, 4, 8), np.float16), np.zeros((1, 4, 1), np.float16)
    for at in rng.integers(0, 8, 12):
        column = rng.standard_normal((1, 4, 1)).astype(np.float16)
        result = remembers.predict({"column": column, "at": np.array([at])}, state)
        cache[:, :, at : at + 1], total = column, total + column
        assert np.array_equal(result["doubled"], cache * 2)
        assert np.array_equal(result["summed"], total)
        assert np.array_equal(state["cache"].numpy(), cache)
    assert not remembers.new_state()["cache"].any(), "a new text begins with nothing"


def test_inputs_and_outputs_belong_to_the_caller(remembers, rng):
    state, column = remembers.new_state(), rng.standard_normal((1, 4, 1)).astype(np.float16)
    feed = {"column": column.copy(), "at": np.array([3])}
    result = remembers.predict(feed, state)
    feed["column"][:] = result["summed"][:] = 7
    assert np.array_equal(state["total"].numpy(), column)


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "has the states .*cache.*, got none"),
        ({"cache": torch.zeros(1, 4, 8)}, "got {'cache'"),
        ({"cache": torch.zeros(1, 4, 9), "total": torch.zeros(1, 4, 1)}, "4, 9"),
    ],
    ids=["none", "one_missing", "another_shape"],
)
def test_states_that_a_program_does_not_have_are_refused(state, message, remembers):
    with pytest.raises(Problem, match=message) as caught:
        remembers.predict({"column": np.zeros((1, 4, 1)), "at": np.array([0])}, state)
    assert "new_state()" in caught.value.hint


def test_a_position_outside_the_cache_is_refused(remembers):
    with pytest.raises(Problem, match=r"slice_update\): updates shape \[1, 4, 0\]"):
        remembers.predict(
            {"column": np.zeros((1, 4, 1)), "at": np.array([8])}, remembers.new_state()
        )


@pytest.mark.parametrize(
    "change, message, hint",
    [
        ({"column": None}, "got the inputs at", "pass at, column"),
        ({"more": np.zeros(1)}, "got the inputs at, column, more", "pass at, column"),
        ({"column": np.zeros((4, 1))}, r"column has shape \[4, 1\]", r"float16 [1, 4, 1]"),
        ({"at": np.array([0.5])}, "at has dtype float64", "int32 [1]"),
        ({"column": np.full((1, 4, 1), "a")}, "column has dtype <U1", "float16 [1, 4, 1]"),
    ],
    ids=["missing", "unknown", "shape", "a_fraction_for_an_integer", "text"],
)
def test_inputs_that_do_not_match_are_refused(change, message, hint, remembers):
    feed = {"column": np.zeros((1, 4, 1)), "at": np.array([0])} | change
    feed = {name: value for name, value in feed.items() if value is not None}
    with pytest.raises(Problem, match=message) as caught:
        remembers.predict(feed, remembers.new_state())
    assert hint in caught.value.hint


def test_a_trace_names_every_result_and_spent_values_are_freed(tmp_path):
    def build(x):
        for _ in range(9):
            x = Builder.add(x=x, y=np.float16(1))
        return x

    program = open_package(write(tmp_path / "chain.mlpackage", [tensor((64,))], build))
    alive, most = [], []

    def trace(kind: str, name: str, value: torch.Tensor) -> None:
        assert kind == "add"
        alive.append(weakref.ref(value))
        most.append(sum(one() is not None for one in alive))

    result = program.predict({"x": np.zeros(64)}, trace=trace)
    assert next(iter(result.values())).tolist() == [9] * 64
    assert len(most) == 9 and max(most) == 2


def product(factor: int) -> Callable:
    return lambda x: Builder.mul(x=x, y=np.float16(factor), name="y")


@pytest.fixture(scope="module")
def two_functions(tmp_path_factory) -> Path:
    folder, functions = tmp_path_factory.mktemp("functions"), MultiFunctionDescriptor()
    for name, factor in (("twice", 2), ("thrice", 3)):
        single = write(folder / f"{name}.mlpackage", [tensor((3,))], product(factor))
        functions.add_function(str(single), "main", name)
    functions.default_function_name = "twice"
    with contextlib.redirect_stderr(io.StringIO()):
        save_multifunction(functions, str(folder / "both.mlpackage"))
    return folder / "both.mlpackage"


@pytest.mark.parametrize("function, factor", [(None, 2), ("twice", 2), ("thrice", 3)])
def test_one_of_several_functions_is_run(function, factor, two_functions):
    result = open_package(two_functions, function).predict({"x": np.arange(3)})
    assert result["y"].tolist() == [0, factor, 2 * factor]


def test_an_unknown_function_is_refused(two_functions):
    with pytest.raises(Problem, match=r"no function 'main', it has thrice, twice"):
        open_package(two_functions, "main")


def test_a_missing_coremltools_is_reported(two_functions, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("export._coreml_schema")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Problem, match="needs coremltools, which is not installed") as caught:
        open_package(two_functions)
    assert "pip install" in caught.value.hint


def test_reading_a_package_imports_no_coremltools(two_functions):
    code = "import sys; from export.coreml.package import read_package; from pathlib import Path\n"
    code += f"read_package(Path({str(two_functions)!r})); print('coremltools' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ----------------------------------------------------------------------- packages from a stranger


@pytest.fixture(scope="module")
def sound(tmp_path_factory, module_seed) -> Path:
    """A package to be spoiled: it holds weights, modes, small constants."""
    weight = np.random.default_rng(module_seed).standard_normal((8, 6)).astype(np.float16)

    def build(x):
        y = Builder.linear(x=x, weight=weight)
        y = Builder.gelu(x=Builder.pad(x=y, pad=[1, 1], mode="reflect"))
        return Builder.tile(x=y, reps=[2, 1], name="y")

    folder = tmp_path_factory.mktemp("sound")
    return write(folder / "sound.mlpackage", [tensor((3, 6))], build)


@pytest.fixture
def package(sound, tmp_path) -> Path:
    """A package to damage: it holds weights, modes and small constants."""
    return Path(shutil.copytree(sound, tmp_path / "spoiled.mlpackage"))


def test_the_package_damaged_below_is_valid(package, rng):
    x = rng.standard_normal((3, 6)).astype(np.float16)
    assert open_package(package).predict({"x": x})["y"].shape == (6, 10)


@pytest.mark.parametrize("spoil, message", hostile_packages.ALL.values(), ids=hostile_packages.ALL)
def test_an_untrusted_package_is_refused(spoil, message, package):
    spoil(package)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Problem, match=message) as caught:
        open_package(package)
    assert str(caught.value).startswith(str(package)), "it names the file"
    assert caught.value.hint
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 256 * 1024


@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
def test_a_package_with_damaged_bytes_runs_or_is_refused(file, package, rng):
    whole = np.frombuffer((package / file).read_bytes(), np.uint8)
    for _ in range(40):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=rng.integers(1, 4))] = rng.integers(256)
        (package / file).write_bytes(damaged.tobytes())
        with contextlib.suppress(Problem):
            program = open_package(package)
            program.predict({spec.name: np.zeros(spec.shape) for spec in program.inputs})
