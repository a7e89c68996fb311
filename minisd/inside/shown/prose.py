"""What the page of `minisd explain` says beside its figures; names in braces are filled in from the drawing."""

LEAD = """One picture followed through the machine, with the numbers that it really had. Every figure names the file and
the line that compute it."""

WORDS = """The text encoder reads numbers. Byte-pair encoding cuts a text into the pieces that it knows, 49,408 of them,
and each has an id. There are {places} places: a start, the pieces, an end. {filled} {further}"""

READING = """Each token becomes a vector, and every layer of the text encoder rewrites all of them: a token looks at
those before it (self-attention with a causal mask) and at itself (an MLP). What is shown is how much a layer changes
each token's vector, as a part of its length. What comes out behind the last layer that this family reads conditions the
UNet: {context} numbers."""

NOISE = """The network was trained on pictures with known amounts of noise: x = x₀ + σ eps. A drawing starts from noise
alone, at the largest σ, and goes down a few of the trained levels, to 0 in the end."""

NOISE_FIGURE = (
    """σ of the {trained} trained timesteps (grey), on a logarithmic scale, and the {count} levels that were visited."""
)

STEPS = """The network is asked for the noise in x{twice}. {guidance} What is left of x without the noise is the
estimate x₀; {sampler} moves x towards it, to the next level. Move the slider."""

GUIDANCE = """Guidance goes from the first answer towards the second, {scale:g} times as far as that."""

STEPS_FIGURE = """x (scaled to unit variance) and the estimate, both as the VAE or a linear map fitted to it shows
them."""

NUMBERS_FIGURE = """The same in numbers; ‖eps_c − eps_u‖ is how much the prompt changes the noise."""

LATENTS = """All this happens in a smaller space: {small} numbers instead of {large}. Each channel is a rough picture of
its own, none of them a colour."""

LATENTS_FIGURE = """From each channel's smallest number, black, to its largest, white."""

NETWORK = """The UNet goes down to coarser and coarser maps and up again, and hands what it had on the way down to the
block beside it on the way up. Nothing of this is written down anywhere but in the names and shapes of the checkpoint,
from which this drawing is made, too."""

NETWORK_HEAT = """Red: how large the numbers of a block were at step {step} (root mean square, beside the largest)."""

LOOKING = """In every cross-attention each pixel spreads a weight of 1 over the tokens. Bright is where a word gets
most, each map by its own brightest, over the grey picture; rows are layers from the first to the last, in the mean over
heads and steps. Much goes to the tokens behind the prompt, which hold the whole text, since every token has seen those
before it."""

DECODING = """The VAE's decoder makes the picture of the latents: convolutions, one self-attention in the middle, and
upsampling by 2 between levels."""

DECODING_FIGURE = """How large the numbers are at each place (root mean square over the channels), level by level."""
