"""The table of what programs that write checkpoints add, rename and leave out, beside what the published files have.

Read in their sources: a row holds for the versions, commits or issues that it names.  writers.py is what is done with it, and
docs/writers.md the same with an example a row.  Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..models.family import LABELS, UNET

CONV_IN = f"{UNET}.input_blocks.0.0.weight"  # each checkpoint has this tensor: what stands before its name is a wrapper

# Single tensors by which a file says how it was trained (ComfyUI supported_models.py, SDXL.model_type).
MARKERS = {
    "v_pred": "ComfyUI since 51d54775 (July 2023); OneTrainer since c1759917 (January 2025), for SDXL",
    "ztsnr": "ComfyUI since 8b275ce5 (November 2024)",
    "edm_mean": "Playground 2.5's own file",
    "edm_std": "Playground 2.5's own file",
    "edm_vpred.sigma_min": "Stability AI's CosXL; ComfyUI since 30abc324 (April 2024)",
    "edm_vpred.sigma_max": "Stability AI's CosXL; ComfyUI since 30abc324 (April 2024)",
}
NO_VAE = "only the VAE is missing: name one with --vae, or put it in for good: minisd convert FILE --vae VAE -o NAME.safetensors"

TEXT = r"(?:cond_stage_model|conditioner\.embedders\.\d)"
CLIP_L = r"(?:cond_stage_model|conditioner\.embedders\.0)"
HUGGING = rf"({TEXT}\.model)\.transformer\.text_model"  # transformers' names in the place of open_clip's
ATTENTION = r"((?:first_stage_model\.)?(?:en|de)coder\.mid\.attn_1)"

DDPM = "CompVis, Stability AI: ldm/models/diffusion/ddpm.py, register_schedule; OneTrainer"
SD_SCRIPT = "diffusers' convert_diffusers_to_original_stable_diffusion.py"
SDXL_SCRIPT = "diffusers' convert_diffusers_to_original_sdxl.py"
D8AHAZARD = "d8ahazard/sd_dreambooth_extension"
FORGE = "stable-diffusion-webui-forge, Save Checkpoint, 96f264ec to 4a30c157 (August 2024 to February 2025; #2636)"
HIJACKED = "supermerger, saving the model that A1111 has loaded, 33b8ddd to c4e28ae (September to November 2023)"
UNCONVERTED = f"{FORGE}; {SD_SCRIPT} before 0.11.0 (31444f57, December 2022), of SD 2"
LATE_ATTENTION = (
    f"{SD_SCRIPT} of a VAE of diffusers 0.17 or later, before 0.25.0 (6976cab7); EveryDream2trainer (#219); sd-scripts 4e25c8f7 "
    "to 4b7b3bc0 (11 June 2023)"
)
OLD_ATTENTION = f"{SDXL_SCRIPT}, {D8AHAZARD} (diff_to_sdxl.py), of a VAE folder saved before diffusers 0.17"


@dataclass(frozen=True)
class Row:
    """What a writer does to the tensors whose whole name matches."""

    example: str  # a tensor as the file calls it
    pattern: str
    does: str  # one of DOES
    what: str  # of an unneeded one, what it is; of one of another name, its usual name as re.sub takes it; else what to do
    writer: str  # and the versions it holds for
    when: str = ""  # a name that the file must have for this row to hold
    unless: str = ""  # one that it must not have


DOES = {
    "unneeded": "is added, and not needed to draw",
    "renamed": "has another name",
    "turned": "has another name, and is a matrix transposed",
    "flattened": "has axes of length 1 behind the first",
    "stacked": "is a third of a matrix or bias: the others lie below it",
    "left out": "is left out, and has no value that would do",
    "not missed": "is left out, and not needed to draw",
}

# What nobody needs.  Of numbers that nobody reads it does not matter whether they are finite.
ADDED = [
    Row(
        "alphas_cumprod",
        r"(alphas_cumprod(_prev)?|betas|log_one_minus_alphas_cumprod|lvlb_weights|logvar)",
        "unneeded",
        "schedule buffer",
        DDPM,
    ),
    Row("posterior_variance", r"posterior_(variance|log_variance_clipped|mean_coef[12])", "unneeded", "schedule buffer", DDPM),
    Row(
        "sqrt_recip_alphas_cumprod",
        r"sqrt_(alphas_cumprod|one_minus_alphas_cumprod|recip_alphas_cumprod|recipm1_alphas_cumprod)",
        "unneeded",
        "schedule buffer",
        DDPM,
    ),
    Row(
        "denoiser.sigmas",
        r"denoiser\.sigmas",
        "unneeded",
        "schedule buffer",
        "Stability AI: sgm/modules/diffusionmodules/denoiser.py; supermerger, saving the model that A1111 has loaded",
    ),
    Row(
        "model_ema.num_updates",
        r"model_ema\..*",
        "unneeded",
        "moving average of the weights",
        f"CompVis: ldm/modules/ema.py, LitEma, with its counters; {D8AHAZARD} with save_ema",
    ),
    Row(
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        rf"{CLIP_L}\.transformer\.(text_model\.)?embeddings\.position_ids",
        "unneeded",
        "the numbers 0 to 76",
        "whatever saved a CLIPTextModel of transformers before 4.31; in float16 sd-scripts, ComfyUI 9b93b920 (June 2023); mixed, "
        "so no longer whole, A1111's merger (modules/extras.py, 001f22d3); ComfyUI since 1e0fcc9a, for SDXL",
    ),
    Row(
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
        rf"{TEXT}\.model\.transformer\.text_model\.embeddings\.position_ids",
        "unneeded",
        "the numbers 0 to 76",
        f"{SD_SCRIPT} since 0.11.0 (31444f57), of SD 2: Waifu Diffusion 1.4 (sd-scripts f1923388); ComfyUI 9b93b920 to b2f03164 "
        "(June, July 2023), of SDXL",
    ),
    Row(
        "conditioner.embedders.1.model.text_model.embeddings.position_ids",
        rf"{TEXT}\.model\.text_model\.embeddings\.position_ids",
        "unneeded",
        "the numbers 0 to 76",
        f"{SDXL_SCRIPT} since ecded50a (August 2023), {D8AHAZARD} (diff_to_sdxl.py)",
    ),
    Row(
        "cond_stage_model.model.logit_scale",
        rf"{TEXT}\.model\.logit_scale",
        "unneeded",
        "number of CLIP's own training",
        "open_clip, so the published SD 2 and SDXL; as 1 sd-scripts (convert_text_encoder_state_dict_to_sd_v2), TheLastBen's "
        "convertosdv2.py, OneTrainer since 31c71ccf",
    ),
    Row(
        "conditioner.embedders.0.logit_scale",
        rf"{CLIP_L}\.logit_scale",
        "unneeded",
        "number of CLIP's own training",
        "ComfyUI since ec96f6d0 (August 2023), of SDXL to 1e0fcc9a (February 2024), of SD 1 to cacb022c (March 2024)",
    ),
    Row(
        "conditioner.embedders.0.text_projection",
        rf"{CLIP_L}\.text_projection",
        "unneeded",
        "projection for CLIP's own training",
        "ComfyUI ec96f6d0 to 1cb3f6a8 (August 2023 to February 2024), an identity matrix (ComfyUI#2898, #2923)",
    ),
    Row(
        "cond_stage_model.transformer.text_projection.weight",
        rf"{CLIP_L}\.transformer\.text_projection\.weight",
        "unneeded",
        "projection for CLIP's own training",
        f"ComfyUI since 1cb3f6a8 (February 2024), of SDXL to 1e0fcc9a, of SD 1 to cacb022c (March 2024); {FORGE}",
    ),
    Row(
        "conditioner.embedders.1.model.transformer.text_projection.weight",
        rf"{TEXT}\.model\.transformer\.text_projection\.weight",
        "unneeded",
        "text_projection a second time, transposed",
        "ComfyUI b416be7d to 37a86e46 (27 to 28 February 2024)",
    ),
    Row(
        "first_stage_model.loss.discriminator.main.0.weight",
        r"first_stage_model\.loss\..*",
        "unneeded",
        "of the autoencoder's training",
        "CompVis: ldm/models/autoencoder.py, AutoencoderKL",
    ),
    Row(
        "first_stage_model.model_ema.decay",
        r"first_stage_model\.model_ema\..*",
        "unneeded",
        "moving average of the autoencoder",
        "Stability AI: stablediffusion, ldm/models/autoencoder.py, with ema_decay",
    ),
    Row(
        "embedding_manager.string_to_param_dict.*",
        r"embedding_manager\..*",
        "unneeded",
        "textual inversion training",
        "rinongal/textual_inversion: ldm/models/diffusion/ddpm.py, with unfreeze_model",
    ),
    Row(
        "cond_stage_model.embedders.0.transformer.text_model.final_layer_norm.bias",
        r"cond_stage_model\.embedders\.\d\..*",
        "unneeded",
        "the text encoders of SDXL a second time",
        "supermerger, saving the model that A1111 has loaded, 33b8ddd to 3270e83 (September to December 2023)",
    ),
    Row(
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.wrapped.weight",
        r".*\.embeddings\.token_embedding\.wrapped\.weight",
        "unneeded",
        "the token embedding a second time",
        "stable-diffusion-webui-forge, Save Checkpoint, since 96f264ec (August 2024): CLIPEmbeddingForTextualInversion",
    ),
    *(Row(key, re.escape(key), "unneeded", "marker of how the model was trained", writer) for key, writer in MARKERS.items()),
]

# Such a tensor gets its usual name where the file has none of that name.
NAMED = [
    Row(
        "model.diffusion_model._orig_mod.out.2.bias",
        r"((?:.*\.)?)_orig_mod\.(.*)",
        "renamed",
        r"\1\2",
        "torch.compile, OptimizedModule (pytorch#101107): sgm/modules/diffusionmodules/wrappers.py with compile_model; ComfyUI's "
        "TorchCompileModel before CheckpointSave, d0b7ab88 to 65da29aa (September 2024 to May 2025)",
    ),
    Row(
        "module.model.diffusion_model.out.2.bias",
        r"module\.(.*)",
        "renamed",
        r"\1",
        "torch.nn.DataParallel, DistributedDataParallel, not unwrapped before saving",
    ),
    Row(
        "cond_stage_model.transformer.final_layer_norm.bias",
        rf"({CLIP_L})\.transformer\.((?:embeddings|encoder|final_layer_norm)\..*)",
        "renamed",
        r"\1.transformer.text_model.\2",
        "NovelAI and merges with it (model toolkit, CLIP-v1-NAI); OneTrainer with transformers 5 (2026), whose CLIPTextModel has "
        "these names",
    ),
    Row(
        "cond_stage_model.wrapped.transformer.text_model.final_layer_norm.bias",
        rf"({TEXT})\.wrapped\.(.*)",
        "renamed",
        r"\1.\2",
        HIJACKED,
    ),
    Row(
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.wrapped.weight",
        rf"({TEXT}\..*\.token_embedding)\.wrapped\.weight",
        "renamed",
        r"\1.weight",
        HIJACKED,
    ),
    Row(
        "cond_stage_model..transformer.text_model.final_layer_norm.bias",
        r"cond_stage_model\.\.transformer\.(.*)",
        "renamed",
        r"cond_stage_model.transformer.\1",
        "OneTrainer 31c71ccf to 10261e61 (June, July 2023), of SD 1",
    ),
    Row(
        "conditioner.embedders.0.model.ln_final.bias",
        r"conditioner\.embedders\.0\.model\.(.*)",
        "renamed",
        r"cond_stage_model.model.\1",
        "Stability AI: generative-models, training with configs/inference/sd_2_1.yaml; ComfyUI calls it SD2 in sgm format",
        when=CONV_IN,
        unless=LABELS,
    ),
    Row(
        "vae.quant_conv.bias",
        r"vae\.((?:(?:en|de)coder\.(?:conv_|norm_out|mid\.|down\.|up\.)|(?:post_)?quant_conv).*)",
        "renamed",
        r"first_stage_model.\1",
        FORGE,
    ),
    Row(
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias",
        r"text_encoders\.clip_l\.(.*)",
        "renamed",
        r"cond_stage_model.\1",
        FORGE,
        when=CONV_IN,
        unless=LABELS,
    ),
    Row(
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        r"text_encoders\.clip_l\.(.*)",
        "renamed",
        r"conditioner.embedders.0.\1",
        FORGE,
        when=LABELS,
    ),
    Row(
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias",
        r"text_encoders\.clip_g\.(.*)",
        "renamed",
        r"conditioner.embedders.1.model.\1",
        FORGE,
        when=LABELS,
    ),
    Row(
        "text_encoders.clip_h.transformer.text_model.final_layer_norm.bias",
        r"text_encoders\.clip_h\.(.*)",
        "renamed",
        r"cond_stage_model.model.\1",
        FORGE,
        when=CONV_IN,
    ),
    Row(
        "cond_stage_model.transformer.text_model.encoder.layers.22.layer_norm2.bias",
        r"cond_stage_model\.transformer\.text_model\.(.*)",
        "renamed",
        r"cond_stage_model.model.transformer.text_model.\1",
        f"{SD_SCRIPT} before 0.11.0 (31444f57, December 2022), of SD 2, whose 23 layers tell it from CLIP ViT-L",
        when="cond_stage_model.transformer.text_model.encoder.layers.22.layer_norm2.bias",
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.embeddings.token_embedding.weight",
        rf"{HUGGING}\.embeddings\.token_embedding\.weight",
        "renamed",
        r"\1.token_embedding.weight",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.embeddings.position_embedding.weight",
        rf"{HUGGING}\.embeddings\.position_embedding\.weight",
        "renamed",
        r"\1.positional_embedding",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.final_layer_norm.bias",
        rf"{HUGGING}\.final_layer_norm\.(weight|bias)",
        "renamed",
        r"\1.ln_final.\2",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.encoder.layers.0.layer_norm1.bias",
        rf"{HUGGING}\.encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)",
        "renamed",
        r"\1.transformer.resblocks.\2.ln_\3.\4",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        rf"{HUGGING}\.encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)",
        "renamed",
        r"\1.transformer.resblocks.\2.mlp.c_fc.\3",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.encoder.layers.0.mlp.fc2.bias",
        rf"{HUGGING}\.encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)",
        "renamed",
        r"\1.transformer.resblocks.\2.mlp.c_proj.\3",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.encoder.layers.0.self_attn.out_proj.bias",
        rf"{HUGGING}\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
        "renamed",
        r"\1.transformer.resblocks.\2.attn.out_proj.\3",
        UNCONVERTED,
    ),
    Row(
        "cond_stage_model.model.transformer.text_model.encoder.layers.0.self_attn.q_proj.bias",
        rf"{HUGGING}\.encoder\.layers\.(\d+)\.self_attn\.(?P<part>[qkv])_proj\.(weight|bias)",
        "stacked",
        r"\1.transformer.resblocks.\2.attn.in_proj_\4",
        UNCONVERTED,
    ),
    Row(
        "conditioner.embedders.1.model.text_projection.weight",
        rf"({TEXT}\.model)\.text_projection\.weight",
        "turned",
        r"\1.text_projection",
        f"{SDXL_SCRIPT} before 0.27.0 (371f7659), {D8AHAZARD} (diff_to_sdxl.py), Playground 2 (sd-scripts 5713d63d, #1945)",
    ),
    Row(
        "conditioner.embedders.1.model.transformer.text_projection.weight",
        rf"({TEXT}\.model)\.transformer\.text_projection\.weight",
        "turned",
        r"\1.text_projection",
        f"ComfyUI 1cb3f6a8 to b416be7d (25 to 27 February 2024); {FORGE}",
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.to_q.bias",
        rf"{ATTENTION}\.to_([qkv])\.(weight|bias)",
        "renamed",
        r"\1.\2.\3",
        LATE_ATTENTION,
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.to_out.0.bias",
        rf"{ATTENTION}\.to_out\.0\.(weight|bias)",
        "renamed",
        r"\1.proj_out.\2",
        LATE_ATTENTION,
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.query.bias",
        rf"{ATTENTION}\.(q)uery\.(weight|bias)",
        "renamed",
        r"\1.\2.\3",
        OLD_ATTENTION,
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.key.bias",
        rf"{ATTENTION}\.(k)ey\.(weight|bias)",
        "renamed",
        r"\1.\2.\3",
        OLD_ATTENTION,
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.value.bias",
        rf"{ATTENTION}\.(v)alue\.(weight|bias)",
        "renamed",
        r"\1.\2.\3",
        OLD_ATTENTION,
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.proj_attn.bias",
        rf"{ATTENTION}\.proj_attn\.(weight|bias)",
        "renamed",
        r"\1.proj_out.\2",
        OLD_ATTENTION,
    ),
    Row(
        "first_stage_model.encoder.mid.attn_1.q.bias",
        rf"{ATTENTION}\.(q|k|v|proj_out)\.bias",
        "flattened",
        r"\1.\2.bias",
        f"{SD_SCRIPT} 0.25.0 to 0.26 (6976cab7 to 371f7659), {D8AHAZARD} 797cb64 to d3ec9cb (December 2023 to March 2024)",
    ),
    Row(
        "model_ema.out2bias",
        r"model_ema\.((?:time_embed|label_emb|input_blocks|middle_block|output_blocks|out\d).*)",
        "renamed",
        r"model_ema.diffusion_model\1",
        f"{D8AHAZARD} since e184d38 (January 2023), with save_ema",
    ),
]

LEFT_OUT = [
    # An identity matrix, which ComfyUI takes here, draws something else.
    Row(
        "conditioner.embedders.1.model.text_projection",
        r"conditioner\.embedders\.\d\.model\.text_projection",
        "left out",
        "take the text encoders of another checkpoint: minisd convert FILE --text OTHER -o NAME.safetensors",
        "merges of SDXL (ComfyUI-SUPIR#81)",
    ),
    Row(
        "first_stage_model.quant_conv.weight",
        r"first_stage_model\.(post_)?quant_conv\.(weight|bias)",
        "left out",
        "take the VAE of another checkpoint: minisd convert FILE --vae OTHER -o NAME.safetensors",
        "OneTrainer 06d5e3a1 to f78a74ae (2 to 9 July 2024)",
    ),
    Row(
        "first_stage_model.decoder.conv_in.weight",
        r"first_stage_model\..*",
        "left out",
        NO_VAE,
        "A1111's merger with discard_weights (modules/extras.py)",
    ),
    Row(
        "cond_stage_model.model.text_projection",
        r"cond_stage_model\.model\.(text_projection|logit_scale)",
        "not missed",
        "SD 2 does not use them",
        f"{SD_SCRIPT} since 0.11.0, Waifu Diffusion 1.4 (model toolkit, CLIP-v2-WD), EveryDream2trainer; as ones sd-scripts, "
        "TheLastBen's convertosdv2.py, OneTrainer",
    ),
    Row(
        "cond_stage_model.model.transformer.resblocks.23.ln_1.bias",
        r"cond_stage_model\.model\.transformer\.resblocks\.23\..*",
        "not missed",
        "SD 2 leaves its last layer out",
        f"{SD_SCRIPT} since 0.11.0, Waifu Diffusion 1.4, EveryDream2trainer, OneTrainer since 31c71ccf; as a copy of the 22nd "
        "sd-scripts, TheLastBen's convertosdv2.py",
    ),
    Row(
        "conditioner.embedders.1.model.logit_scale",
        r"conditioner\.embedders\.\d\.model\.logit_scale",
        "not missed",
        "number of CLIP's own training",
        f"{SDXL_SCRIPT}; sd-scripts where its source has none",
    ),
    Row(
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        rf"{CLIP_L}\.transformer\.text_model\.embeddings\.position_ids",
        "not missed",
        "the numbers 0 to 76",
        "whatever saves a CLIPTextModel of transformers 4.31 or later (sd-scripts#687)",
    ),
]

TABLE = [*ADDED, *NAMED, *LEFT_OUT]
