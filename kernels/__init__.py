"""2:4 packing and kernels: smaller on disk, faster to run. Importing this needs torch and einops only."""

from sparsegpt.kernels.format.pack import Packed24, first_violation, pack, unpack
from sparsegpt.kernels.format.quantized import Quantized24, dequantize, quantize

__all__ = ["Packed24", "Quantized24", "dequantize", "first_violation", "pack", "quantize", "unpack"]
