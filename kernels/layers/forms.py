"""The formats of packed weights, one row each: what files store, and the layer that computes with it, whose table holds
the kernels. Files, operators and measurements find a format here and nowhere else."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.bitmask import BitmaskValues
from sparsegpt.kernels.format.bitmask_integers import BitmaskIntegers
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.format.pack import FloatValues
from sparsegpt.kernels.format.quantized import IntegerValues
from sparsegpt.kernels.layers.bitmask_linear import BitmaskLinear, QuantizedBitmaskLinear
from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.kernels.layers.quantized_linear import Quantized24Linear
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear

LAYERS: Mapping[type[Form], type[PackedLinear]] = {
    FloatValues: Sparse24Linear,
    IntegerValues: Quantized24Linear,
    BitmaskValues: BitmaskLinear,
    BitmaskIntegers: QuantizedBitmaskLinear,
}

# The formats by the name of their pattern, in the order in which a weight is offered to them: with values as they were,
# and with integers.
FORMATS = {
    FloatValues.pattern: (FloatValues, IntegerValues),
    BitmaskValues.pattern: (BitmaskValues, BitmaskIntegers),
}


def usual_forms(pattern: str | None = None, bits: int | None = None, group_size: int | None = None) -> tuple[Form, ...]:
    """The forms to choose from by a weight's pattern: of one format or of all, with values as they were or integers.

    Raises SparseGPTError for a pattern that no format has, other bits than 8 and 4, and a bad group_size.
    """
    if pattern not in (None, *FORMATS):
        raise SparseGPTError(f"format: expected one of {', '.join(FORMATS)}; found {pattern!r}")
    rows = FORMATS.values() if pattern is None else [FORMATS[pattern]]
    if bits is None:
        return tuple(floats() for floats, _ in rows)
    return tuple(integers(bits, *(() if group_size is None else (group_size,))) for _, integers in rows)


def layer_class(form: Form) -> type[PackedLinear]:
    """The layer for weights in a form."""
    return LAYERS[type(form)]


def read_form(settings: Mapping[str, Any]) -> Form:
    """The form that gave these settings (`Form.settings`). Raises SparseGPTError where no format here knows them."""
    for kind in LAYERS:
        form = kind.read(settings)
        if form is not None:
            return form
    patterns = ", ".join(dict.fromkeys(kind.pattern for kind in LAYERS))
    raise SparseGPTError(
        f"packed with pattern {str(settings.get('pattern'))[:40]}; this package reads {patterns}: update sparsegpt"
    )


@functools.cache
def form_of(text: str) -> Form:
    """The form of a layer's `form_text`; raises as `read_form`."""
    return read_form(json.loads(text))


def samples() -> list[Form]:
    """The forms that measurements of kernels try."""
    return [form for kind in LAYERS for form in kind.samples()]
