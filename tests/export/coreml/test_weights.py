"""Stored forms of weights: codes and palettes agree with quantise.py, theory and what a program
reads.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from export.coreml import weights as forms
from export.coreml.graph import TARGETS, Graph, program, save
from export.coreml.interpreter import open_package
from export.coreml.layers import stored
from export.coreml.weights import form_of
from export.manifest import Spec
from export.quantise import Scheme, dequantise, fake_quantise, quantise


def draw(rng, *shape):
    """Weights whose rows are of very different sizes; some are zero."""
    sizes = 10.0 ** rng.uniform(-6, 2, (shape[0], 1))
    rows = rng.standard_normal((shape[0], int(np.prod(shape[1:])))) * sizes
    rows[rng.random(rows.shape) < 0.1] = 0
    rows[int(rng.integers(shape[0]))] = 0
    return rows.reshape(shape).astype(np.float32)


# ------------------------------------------------------------------------------- which form it is


@pytest.mark.parametrize(
    ("precision", "bits", "matrix", "table"),
    [
        ("fp32", None, "float32", "float32"),
        ("fp16", None, "float16", "float16"),
        ("fp16", 4, "float16", "float16"),
        ("int8", None, "int8", "int8"),
        ("int8", 4, "int4", "int4"),
        ("int8", 16, "float16", "float16"),
        ("int8", 32, "float16", "float16"),
        ("int4", None, "int4", "int8"),
        ("int4", 8, "int8", "int8"),
        ("pal4", None, "palette4", "int8"),
        ("pal6", None, "palette6", "palette6"),
        ("pal8", None, "palette8", "palette8"),
        ("pal6", 4, "palette6", "palette6"),
        ("pal8", 8, "int8", "int8"),
        ("pal4", 32, "float16", "float16"),
    ],
)
def test_forms_follow_the_precision_and_the_checkpoint(precision, bits, matrix, table):
    scheme = None if bits is None else Scheme(bits)
    assert form_of(precision, scheme, False, 64).name == matrix
    assert form_of(precision, scheme, True, 64).name == table


@pytest.mark.parametrize(
    ("inputs", "scheme", "name"),
    [
        (96, None, "int4"),
        (40, None, "int4"),
        (12, None, "int8"),
        (9, None, "int8"),
        (48, Scheme(4, block=64), "int4"),
        (36, Scheme(4, block=256), "int8"),
        (9, Scheme(4, per="tensor"), "int4"),
    ],
)
def test_blocks_that_do_not_divide_become_int8_with_a_note(inputs, scheme, name):
    form = form_of("int4", scheme, False, inputs)
    assert form.name == name
    assert bool(form.note) == (name == "int8")
    assert not form.note or f"divides {inputs} inputs" in form.note


# ------------------------------------------------------------------------------------------ codes


def test_int8_is_off_by_half_a_scale_at_most_even_for_small_rows(rng):
    rows = draw(rng, 40, 30)
    codes, scale = forms.int8(rows, Scheme(8))
    assert scale.dtype == np.float16 and np.abs(codes).max() <= 127
    step = scale.astype(np.float64)[:, None]
    assert (np.abs(codes * step - rows) <= 0.502 * step).all()
    assert not codes[rows == 0].any()


@pytest.mark.parametrize(
    "scheme", [Scheme(4), Scheme(4, block=64), Scheme(4, per="tensor")], ids=str
)
@pytest.mark.parametrize("inputs", [96, 40, 8])
def test_int4_is_off_by_half_a_scale_in_blocks_that_divide(inputs, scheme, rng):
    rows = draw(rng, 20, inputs)
    codes, scale = forms.int4(rows, scheme)
    assert inputs % scale.shape[1] == 0
    assert codes.min() >= -8 and codes.max() <= 7
    wide = scale.astype(np.float64).repeat(inputs // scale.shape[1], axis=1)
    # the weight of largest magnitude may be half a scale beyond the last code on the other side
    assert (np.abs(codes * wide - rows) <= 1.002 * np.abs(wide)).all()
    assert np.mean(np.abs(codes * wide - rows) <= 0.502 * np.abs(wide)) > 0.9
    assert not codes[rows == 0].any()


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_on_its_grid_gets_the_codes_of_its_grid(bits, per, rng):
    scheme = Scheme(bits, per=per)
    drawn = torch.from_numpy(rng.standard_normal((30, 80)).astype(np.float32))
    rows = fake_quantise(drawn, scheme)
    expected, scales = quantise(rows, scheme)
    codes, scale = (forms.int4 if bits == 4 else forms.int8)(rows.numpy(), scheme)
    assert np.array_equal(codes, expected.numpy())
    wide = scale.reshape(30, -1).astype(np.float64).repeat(80 // (scale.size // 30), axis=1)
    exact = dequantise(expected, scales, scheme).numpy()
    assert np.abs(codes * wide - exact).max() <= 2**-10 * np.abs(exact).max()


# --------------------------------------------------------------------------------------- palettes


def least_error(values, count):
    """Of all ways to cut ascending values into groups, the least sum of squares about means."""
    return min(
        sum(np.var(part) * len(part) for part in np.split(values, cuts))
        for cuts in itertools.combinations(range(1, len(values)), count - 1)
    )


def error(rows, indices, numbers):
    groups = indices.reshape(len(numbers), -1)
    result = np.take_along_axis(numbers.astype(np.float64), groups.astype(int), axis=1)
    return np.square(result - rows.reshape(len(numbers), -1)).sum(1)


def test_a_palette_is_close_to_the_optimum(rng, monkeypatch):
    values = np.sort(rng.standard_normal(26)).astype(np.float32)[None]
    indices, numbers = forms.palettes(values, 2)
    assert numbers.shape == (1, 4)
    assert error(values, indices, numbers)[0] <= 1.6 * least_error(values[0], 4) + 1e-4


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_palettes_have_the_error_that_theory_gives_for_normal_weights(bits, rng):
    """Panter and Dite: the best levels leave sqrt(3) pi / 2 / levels**2 of the variance."""
    rows = rng.standard_normal((64, 1024)).astype(np.float32)
    indices, numbers = forms.palettes(rows, bits)
    left = error(rows, indices, numbers)[0] / rows.size
    assert left < 1.15 * np.sqrt(3) * np.pi / 2 / 4**bits
    assert (np.diff(numbers.astype(np.float32)) >= 0).all()


def test_each_group_of_rows_has_its_palette_and_zeros_stay_zeros(rng):
    rows = draw(rng, 32, 48)
    indices, numbers = forms.palettes(rows, 4, groups=2)
    for half in range(2):
        part = rows[16 * half : 16 * (half + 1)]
        alone = forms.palettes(part, 4)
        assert np.array_equal(alone[0], indices[16 * half : 16 * (half + 1)])
        assert np.array_equal(alone[1][0], numbers[half])
        assert not numbers[half][alone[0][part == 0]].any()


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_palette_of_a_constant_weight_is_exact(value):
    indices, numbers = forms.palettes(np.full((4, 5), value, np.float32), 4)
    assert (numbers[0][indices] == value).all()


# ------------------------------------------------------------------------- what a program reads


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(32, 40), (32, 40, 1, 1), (32, 8, 3)], ids=str)
@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("int8", "iOS16"),
        ("int4", "iOS18"),
        *[("pal4", name) for name in TARGETS],
        ("pal6", "iOS16"),
        ("pal8", "iOS18"),
    ],
)
def test_a_program_reads_the_stored_weight(precision, target, shape, transposed, rng, tmp_path):
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < 0.1] = 0
    kernel = len(shape) == 3
    g = Graph(precision, target)
    given = Spec("x", (1,), "float16")

    def body(values):
        constant = stored(g, weight, None, kernel, transposed)
        return [g.add(constant, g.reshape(values["x"], *[1] * len(shape)))]

    turned = weight.swapaxes(0, 1) if transposed else weight
    made = program(g, [given], [Spec("y", turned.shape, "float16")], body)
    save(made, target, tmp_path / "x.mlpackage", "a weight")
    opened = open_package(tmp_path / "x.mlpackage")
    result = opened.predict({"x": np.zeros(1, np.float16)})["y"]
    rows = weight.reshape(len(weight), -1)
    form = form_of(precision, None, kernel, rows.shape[1])
    if form.name == "int8":
        codes, scale = forms.int8(rows, Scheme(8))
        want = codes * scale[:, None].astype(np.float32)
    elif form.name == "int4":
        codes, scale = forms.int4(rows, Scheme(4))
        want = codes * scale.astype(np.float32).repeat(rows.shape[1] // scale.shape[1], axis=1)
    else:
        groups = len(rows) // 16 if target == "iOS18" and precision != "pal8" else 1
        indices, numbers = forms.palettes(rows, form.bits, groups)
        want = np.take_along_axis(numbers, indices.reshape(groups, -1).astype(int), axis=1)
    want = want.astype(np.float16).reshape(shape)
    assert np.array_equal(result, want.swapaxes(0, 1) if transposed else want)
    assert not result[turned == 0].any()
    assert list(g.stored.values()) == [weight.size]
