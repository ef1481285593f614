"""The interpreter of Core ML packages: every operation against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from built_packages import Builder, tensor, types, write

from export.coreml.interpreter import Program, open_package
from export.coreml.operations import OPERATIONS
from export.problem import Problem

SIZES = {"x": (2, 3, 4, 6), "y": (2, 3, 4, 6), "ids": (5,), "at": (1,)}
DTYPES = {"fp16": types.fp16, "fp32": types.fp32}


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
