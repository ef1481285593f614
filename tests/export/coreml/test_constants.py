"""The interpreter of Core ML packages: every form of a constant against coremltools' own
decompression."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from built_packages import Builder, ct, tensor, types, write

from export.coreml.constants import FORMS
from export.coreml.interpreter import open_package


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
