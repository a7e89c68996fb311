"""Decoding and encoding in bands of rows: the numbers of the whole picture, in a quarter of the memory.

Bands that know nothing of each other show seams, for two reasons.  A convolution reads across their edges: so every band
brings `HALO` rows of its neighbours, which are cut off the result again.  And GroupNorm takes mean and variance over the
whole feature map: so a first sweep over the bands gathers them, and a second one uses them.  Nothing is estimated or blended;
the price is time, because what leads up to a norm is computed once more.  Attention, which sees every pixel, stands where the
map is small: there the picture stays whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OutOfMemoryError
from ..models.layers import GroupNorm
from ..models.vae import AutoencoderKL, Downsample, Level, ResnetBlock, Upsample
from ..system.memory import free_memory, memory_errors

ROWS = 48  # of pixels in a band, a multiple of 8: with 64, 3 % less work at 1024x1024 pixels, but 0.22 of the memory, not 0.21
HALO = 2  # rows: a ResnetBlock reads two up and down, an Upsample before it half a row more, a Downsample one down
STEPS = 2  # of resolution, from the picture on, that are taken in bands; the maps beyond are small and stay whole
DECODED = 1 << 20  # pixels at once, if that is more than one picture: enough to fill a GPU, and far from 2^31 numbers in a map
CPU_LIMIT = 1 << 30  # bytes; beyond (SDXL's 1024x1024 pixels), half as long a decode is 2 % of a picture's time, and saves 1.4 GB

Bands = list[Tensor]  # a feature map (1, C, H, W), cut into (1, C, h, W) from top to bottom
Step = Callable[[Tensor], Tensor]  # from (1, C_in, h, W) to (1, C_out, r*h, r*W), with r = 1, 2 or 1/2


def decode(vae: AutoencoderKL, latents: Tensor, whole: Step | None = None) -> Tensor:
    """`vae.decode`: whole where the device has the memory, in bands where it has not, or where it runs out of it after all.

    whole: what decodes in the place of `vae.decode`, to the same result.
    Raises OutOfMemoryError if there is no room even so.
    """
    count = max(1, DECODED // (latents.shape[2] * latents.shape[3] * vae.downscale**2))
    if len(latents) > count:
        return torch.cat([decode(vae, some, whole) for some in latents.split(count)])
    if fits(vae, latents):
        try:
            with memory_errors():
                return (whole or vae.decode)(latents)
        except OutOfMemoryError:
            warnings.warn("no memory to decode the picture whole: decoding in bands, which takes longer", stacklevel=2)
    with memory_errors():  # outside the except clause, whose traceback holds the tensors of the first attempt
        return decode_tiled(vae, latents)


def encode(vae: AutoencoderKL, image: Tensor) -> tuple[Tensor, Tensor]:
    """`vae.encode` in the same two ways; image (B, 3, H, W), multiples of vae.downscale.  Raises OutOfMemoryError."""
    if fits(vae, image[:, :, :: vae.downscale, :: vae.downscale]):  # as large as its latents; the encoder needs no more
        try:
            with memory_errors():
                return vae.encode(image)
        except OutOfMemoryError:
            warnings.warn("no memory to encode the picture whole: encoding in bands, which takes longer", stacklevel=2)
    with memory_errors():
        return encode_tiled(vae, image)


def fits(vae: AutoencoderKL, latents: Tensor) -> bool:
    """Whether decoding these latents (B, C, h, w) whole takes at most half of the memory that is free now, and on a CPU at
    most `CPU_LIMIT`; if the free memory cannot be known, True."""
    size = decode_bytes(vae, latents)
    if latents.device.type == "cpu" and size > CPU_LIMIT:
        return False
    free = free_memory(latents.device, 2 * size)
    return free is None or 2 * size <= free


def decode_bytes(vae: AutoencoderKL, latents: Tensor) -> int:
    """What the activations of a whole decode take at their peak: in the first block at full size, its input and, each once,
    its hidden map, the same normalised, the shortcut and the sum."""
    conv: nn.Conv2d = vae.decoder.up[0].block[0].conv1  # type: ignore[index, union-attr, assignment]
    channels = conv.in_channels + 4 * conv.out_channels
    pixels = latents.shape[0] * latents.shape[2] * latents.shape[3] * vae.downscale**2
    return pixels * channels * latents.element_size()


@torch.no_grad()
def decode_tiled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """`vae.decode` in bands: latents (B, C, h, w) -> image (B, 3, H, W), the same but for rounding."""
    return torch.cat([decode_one(vae, one) for one in latents.split(1)])


@torch.no_grad()
def encode_tiled(vae: AutoencoderKL, image: Tensor) -> tuple[Tensor, Tensor]:
    """`vae.encode` in bands: image (B, 3, H, W), multiples of vae.downscale -> mean and logvar, (B, C, h, w) each."""
    moments = torch.cat([vae.quant_conv(encode_one(vae, one)) for one in image.split(1)])
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)  # as in AutoencoderKL.encode


def decode_one(vae: AutoencoderKL, latents: Tensor) -> Tensor:  # (1, C, h, w) -> (1, 3, H, W)
    decoder = vae.decoder
    steps = steps_of(reversed(decoder.up))
    ups = [i for i, step in enumerate(steps) if isinstance(step, Upsample)][-STEPS:]
    start = ups[0] if ups else 0
    x = decoder.mid(decoder.conv_in(vae.post_quant_conv(latents)))
    for step in steps[:start]:
        x = step(x)
    bands = cut(x, ROWS >> len(ups))
    del x
    before: Step | None = None
    for i, step in enumerate(steps[start:], start):
        if isinstance(step, ResnetBlock):
            resnet(bands, step, before)
            before = None
        elif i == ups[-1]:
            before = step  # its result would be the largest map of all, twice what the blocks after it hand on
        else:
            replace(bands, step)
    norm_out = fixed(decoder.norm_out, bands)
    return torch.cat(list(sweep(bands, lambda x: decoder.conv_out(norm_out(x)))), dim=2)


def encode_one(vae: AutoencoderKL, image: Tensor) -> Tensor:  # (1, 3, H, W) -> (1, 2*C, h, w)
    encoder = vae.encoder
    steps = steps_of(encoder.down)
    downs = [i for i, step in enumerate(steps) if isinstance(step, Downsample)][:STEPS]
    end = downs[-1] + 1 if downs else len(steps)
    bands = cut(image, ROWS)
    replace(bands, encoder.conv_in)
    for step in steps[:end]:
        if isinstance(step, ResnetBlock):
            resnet(bands, step)
        else:
            replace(bands, step)
    x = torch.cat(bands, dim=2)
    del bands
    for step in steps[end:]:
        x = step(x)
    return encoder.conv_out(encoder.norm_out(encoder.mid(x)))


def steps_of(levels: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of all levels, and what leads from each level to the next, in the order of their use (see vae.Level)."""
    steps: list[nn.Module] = []
    for level in levels:
        assert isinstance(level, Level)
        steps += [*level.block, *(child for name, child in level.named_children() if name != "block")]
    return steps


def resnet(bands: Bands, block: ResnetBlock, before: Step | None = None) -> None:
    """Puts in the place of a map what ResnetBlock.forward makes of it, after the step `before` if there is one."""
    first: Step = before or nn.Identity()
    norm1 = fixed(block.norm1, sweep(bands, before) if before else bands)
    norm2 = fixed(block.norm2, sweep(bands, lambda x: block.conv1(norm1(first(x)))))

    def forward(x: Tensor) -> Tensor:
        x = first(x)
        h = block.conv2(norm2(block.conv1(norm1(x))))
        return h.add_(block.nin_shortcut(x))  # only now, and in place: at full size, every map counts

    replace(bands, forward)


def fixed(norm: GroupNorm, bands: Iterable[Tensor]) -> Step:
    """The norm for use on single bands (1, C, h, W), with mean and variance of the map that `bands` make together."""
    sizes: list[int] = []
    moments: list[tuple[Tensor, Tensor]] = []
    for band in bands:
        groups = band.float().view(norm.num_groups, -1)
        sizes.append(groups.shape[1])
        moments.append(torch.var_mean(groups, dim=1, correction=0))
    variances, means = (torch.stack(values) for values in zip(*moments, strict=True))  # (bands, groups) each
    share = torch.tensor(sizes, device=means.device)[:, None] / sum(sizes)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)  # the law of total variance
    channels = norm.num_channels // norm.num_groups
    mean, variance = mean.repeat_interleave(channels), variance.repeat_interleave(channels)  # (C,)
    weight, bias = norm.weight.float(), norm.bias.float()

    def forward(x: Tensor) -> Tensor:  # with statistics that are given, GroupNorm is what BatchNorm is after training
        x = F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)
        return F.silu(x, inplace=True) if norm.silu else x

    return forward


def cut(x: Tensor, rows: int) -> Bands:
    """(1, C, H, W) in bands of some rows each; the last may have less."""
    return [band.contiguous() for band in x.split(rows, dim=2)]


def replace(bands: Bands, step: Step) -> None:
    """Puts the result of a step in the place of the map, band by band, so that the two are never there as a whole."""
    for i, band in enumerate(sweep(bands, step)):
        bands[i] = band


def sweep(bands: Bands, step: Step) -> Iterator[Tensor]:
    """The result of a step over a map, band by band.  A band that has been passed may be replaced."""
    above = bands[0][:, :, :0]
    for i in range(len(bands)):
        below = bands[i + 1][:, :, :HALO] if i + 1 < len(bands) else bands[i][:, :, :0]
        last_rows = bands[i][:, :, -HALO:].clone()  # a view would keep the whole band
        yield with_halo(above, bands[i], below, step)
        above = last_rows


def with_halo(above: Tensor, band: Tensor, below: Tensor, step: Step) -> Tensor:
    """The result of a step for `band`, computed together with a few rows of its neighbours."""
    x = torch.cat([above, band, below], dim=2)
    y = step(x)
    first, last = (row * y.shape[2] // x.shape[2] for row in (above.shape[2], above.shape[2] + band.shape[2]))
    return y[:, :, first:last].contiguous()
