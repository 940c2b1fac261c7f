"""2:4 packing and kernels: smaller on disk, faster to run. Its names need torch and einops only, once they are used."""

from typing import TYPE_CHECKING

from sparsegpt.lazy import lazy_names

if TYPE_CHECKING:
    from sparsegpt.kernels.format.pack import Packed24, first_violation, pack, unpack
    from sparsegpt.kernels.format.quantized import Quantized24, dequantize, quantize
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Packed24": "sparsegpt.kernels.format.pack",
            "Quantized24": "sparsegpt.kernels.format.quantized",
            "dequantize": "sparsegpt.kernels.format.quantized",
            "first_violation": "sparsegpt.kernels.format.pack",
            "pack": "sparsegpt.kernels.format.pack",
            "quantize": "sparsegpt.kernels.format.quantized",
            "unpack": "sparsegpt.kernels.format.pack",
        },
    )

__all__ = ["Packed24", "Quantized24", "dequantize", "first_violation", "pack", "quantize", "unpack"]
