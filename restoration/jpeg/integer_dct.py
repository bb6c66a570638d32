"""libjpeg's own forward DCT and quantisation in whole numbers: what a real encoder makes of 8-bit samples, bit for bit.

Sources: jfdctint.c ("islow", the default method of libjpeg, libjpeg-turbo and Pillow; turbo's SIMD code equals it) and
jcdctmgr.c. libjpeg 7 and later average chroma otherwise; luma is the same there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CONST_BITS, _PASS1_BITS = 13, 2
_F_0_298, _F_0_390, _F_0_541, _F_0_765, _F_0_899, _F_1_175 = 2446, 3196, 4433, 6270, 7373, 9633
_F_1_501, _F_1_847, _F_1_961, _F_2_053, _F_2_562, _F_3_072 = 12299, 15137, 16069, 16819, 20995, 25172


def integer_forward_dct(samples: Tensor) -> Tensor:
    """Eighths of DCT coefficients, int32 (N, Hb, Wb, 8, 8), as libjpeg computes them.

    `samples` (N, 8 Hb, 8 Wb) hold whole levels less 128, -128..127, of any type.
    """
    count, height, width = samples.shape
    blocks = samples.view(count, height // 8, 8, width // 8, 8).permute(4, 2, 0, 1, 3).to(torch.int32).contiguous()
    across = torch.stack(_pass(blocks.unbind(0), -_PASS1_BITS, _CONST_BITS - _PASS1_BITS), 0)
    both = torch.stack(_pass(across.unbind(1), _PASS1_BITS, _CONST_BITS + _PASS1_BITS), 0)
    return both.permute(2, 3, 4, 0, 1).contiguous()


def integer_quantize(eighths: Tensor, steps: Tensor) -> Tensor:
    """Whole multiples, float32, of steps that broadcast against coefficients in eighths; halves go away from zero."""
    magnitudes = eighths.abs().float()  # exact in float32: below 2**16, and a quotient is never nearer to a whole
    return magnitudes.add_(4 * steps).div_(8 * steps).floor_().mul_(eighths.sign())


def _pass(d: tuple[Tensor, ...], even_shift: int, shift: int) -> list[Tensor]:
    """One dimension of the transform (Loeffler, Ligtenberg, Moschytz 1989), with jfdctint.c's names."""
    sums = [d[i] + d[7 - i] for i in range(4)]
    tmp7, tmp6, tmp5, tmp4 = (d[i] - d[7 - i] for i in range(4))
    tmp10, tmp13, tmp11, tmp12 = sums[0] + sums[3], sums[0] - sums[3], sums[1] + sums[2], sums[1] - sums[2]
    z1 = (tmp12 + tmp13) * _F_0_541
    out2, out6 = z1.add(tmp13, alpha=_F_0_765), z1.add_(tmp12, alpha=-_F_1_847)
    z5 = (tmp4 + tmp6 + tmp5 + tmp7) * _F_1_175
    z1, z2 = (tmp4 + tmp7) * -_F_0_899, (tmp5 + tmp6) * -_F_2_562
    z3, z4 = z5.add(tmp4 + tmp6, alpha=-_F_1_961), z5.add(tmp5 + tmp7, alpha=-_F_0_390)
    out7, out5 = (tmp4 * _F_0_298).add_(z1).add_(z3), (tmp5 * _F_2_053).add_(z2).add_(z4)
    out3, out1 = z3.add_(z2).add_(tmp6, alpha=_F_3_072), z4.add_(z1).add_(tmp7, alpha=_F_1_501)
    outs = [
        _descale(tmp10 + tmp11, even_shift),
        out1,
        out2,
        out3,
        _descale(tmp10 - tmp11, even_shift),
        out5,
        out6,
        out7,
    ]
    return [out if place in (0, 4) else _descale(out, shift) for place, out in enumerate(outs)]


def _descale(value: Tensor, shift: int) -> Tensor:
    """`value` divided by 2**shift, halves rounded up; a negative shift multiplies."""
    return value << -shift if shift < 0 else (value + (1 << (shift - 1))) >> shift
