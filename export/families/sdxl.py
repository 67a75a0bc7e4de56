"""SDXL-Turbo and its kin: two text encoders, pooled embeds, time ids."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Family, GraphSpec, Inputs, Shape, SteeredBy
from turbochain.export.families.common import check, ids, tokens, unet_inputs, vae_decoder
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE, Stage


def _check(configs: Mapping[str, Any]) -> list[str]:
    """Return `check`'s phrases, and whether the UNet reads the pooled embeds and six time ids, as the pipeline gives
    them: the refiner's reads five, one of them an aesthetic score."""
    problems, unet = check(configs, addition="text_time"), configs["unet"]
    if problems:
        return problems
    given = configs["text_encoder_2"]["projection_dim"] + 6 * unet["addition_time_embed_dim"]
    if (reads := unet["projection_class_embeddings_input_dim"]) != given:
        problems.append(
            f"the UNet's add_embedding reads {reads} values, and the pooled embeds with six time ids are {given}"
        )
    return problems


def _time_ids(shape: Shape) -> tuple[Any, ...]:
    size = (shape.height, shape.width)  # diffusers' defaults: original size = target size, no crop
    return ((*size, 0, 0, *size),)


def _unet_inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    first, second = configs["text_encoder"], configs["text_encoder_2"]
    length = tokens(configs, "text_encoder")
    return {
        **unet_inputs(configs, shape, "time_embeds", "time_ids_embeds"),
        "prompt_embeds": ("float32", (shape.batch, length, first["hidden_size"])),
        "prompt_embeds_2": ("float32", (shape.batch, length, second["hidden_size"])),
        "pooled_prompt_embeds": ("float32", (shape.batch, second["projection_dim"])),
    }


def _embeds(configs: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    width = configs["text_encoder"]["hidden_size"]
    states = call["encoder_hidden_states"]
    return {
        "prompt_embeds": states[..., :width],
        "prompt_embeds_2": states[..., width:],
        "pooled_prompt_embeds": call["added_cond_kwargs"]["text_embeds"],
    }


FAMILY = Family(
    name="sdxl",
    title="SDXL-Turbo, SDXL, Lightning, Hyper-SD, DMD2, LCM-SDXL",
    pipelines={
        TEXT_TO_IMAGE: "StableDiffusionXLPipeline",
        IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline",
        INPAINTING: "StableDiffusionXLInpaintPipeline",
    },
    kin=(
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
    ),
    components=("text_encoder", "text_encoder_2", "unet", "vae"),
    tokenizers={"input_ids": "tokenizer", "input_ids_2": "tokenizer_2"},
    graphs={
        "text_encoder": GraphSpec(
            role="text_encoder",
            component="text_encoder",
            module="PenultimateTextEncoder",
            inputs=ids("input_ids", "text_encoder"),
            sized=False,
            outputs=("prompt_embeds",),
        ),
        "text_encoder_2": GraphSpec(
            role="text_encoder_2",
            component="text_encoder_2",
            module="PooledTextEncoder",
            inputs=ids("input_ids_2", "text_encoder_2"),
            sized=False,
            outputs=("prompt_embeds_2", "pooled_prompt_embeds"),
        ),
        "unet": GraphSpec(
            role="unet",
            component="unet",
            module="SDXLUNet",
            inputs=_unet_inputs,
            outputs=("prediction",),
        ),
        "vae_decoder": vae_decoder("SDXLVaeDecoder"),
    },
    vae_encoder="SDXLVaeEncoder",
    prompt_stages=(Stage("text_encoder", "prompt", "text"), Stage("text_encoder_2", "prompt", "text")),
    columns=("time_embeds",),
    constants={"time_ids_embeds": _time_ids},
    slot_columns=(),
    pipeline_options={"add_watermarker": False},
    zeros=lambda index: bool(index.get("force_zeros_for_empty_prompt", True)),
    embeds=_embeds,
    check=_check,
    tiny_vae="madebyollin/taesdxl",
    latents_scale=0.13025,
    skipped_layers=1,
    steered={
        "controlnet": SteeredBy(
            {
                TEXT_TO_IMAGE: "StableDiffusionXLControlNetPipeline",
                IMAGE_TO_IMAGE: "StableDiffusionXLControlNetImg2ImgPipeline",
            },
            module="SDXLControlNet",
        ),
        "t2i_adapter": SteeredBy({TEXT_TO_IMAGE: "StableDiffusionXLAdapterPipeline"}),
    },
)
