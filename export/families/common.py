"""What the families share: the VAE's graphs, those without weights, the text-to-image chain, the checks of configs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from turbochain.export.families import Family, GraphSpec, Inputs, Shape, decoder_channels
from turbochain.runtime.bundle.manifest import Draw, Feed, Stage


def tokens(configs: Mapping[str, Any], component: str) -> int:
    """Return the length of a prompt in tokens (77 for CLIP)."""
    return configs[component]["max_position_embeddings"]


def ids(name: str, component: str) -> Any:
    """Return the inputs of a text encoder: [B, tokens] int32."""
    return lambda configs, shape: {name: ("int32", (shape.batch, tokens(configs, component)))}


def latents(configs: Mapping[str, Any], shape: Shape) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of the latents: [B, 4, H/8, W/8] fp32."""
    return "float32", (shape.batch, configs["unet"]["out_channels"], shape.height // 8, shape.width // 8)


def unet_inputs(configs: Mapping[str, Any], shape: Shape, *columns: str) -> Inputs:
    """Return the inputs that every UNet begins with: latents, input_scale, and the columns of the time."""
    return {
        "latents": latents(configs, shape),
        "input_scale": ("float32", (shape.rows, 1, 1, 1) if shape.rows else (1,)),
        **dict.fromkeys(columns),
    }


def vae_decoder(module: str) -> GraphSpec:
    """Return the VAE's decoder, as this class of export.tracing.modules."""
    return GraphSpec(
        role="vae_decoder",
        component="vae",
        module=module,
        inputs=lambda configs, shape: {"next_latents": latents(configs, shape)},
        outputs=("image",),
    )


def vae_encoder(module: str, posterior: bool) -> GraphSpec:
    """Return the VAE's encoder, as this class of export.tracing.modules; `posterior`: whether the VAE makes a
    distribution, from which the graph draws with noise (AutoencoderTiny makes the latents themselves)."""

    def inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
        picture: Inputs = {"input_image": ("uint8", (shape.batch, shape.height, shape.width, 3))}
        return picture | ({"posterior_noise": latents(configs, shape)} if posterior else {})

    return GraphSpec(role="vae_encoder", component="vae", module=module, inputs=inputs, outputs=("image_latents",))


def step(K: int) -> GraphSpec:
    """Return the sampler's row, `S' = m·S + v·prediction + w·noise`, with K tensors in S."""
    given = ("latents", "prediction", "noise", *_row(K))
    return _arithmetic("step", "Step", given, _next(K), K)


def guided_step(K: int) -> GraphSpec:
    """Return `step` with classifier-free guidance, which makes one prediction of two; that is its last output."""
    given = ("latents", "prediction", "negative_prediction", "guidance_scale", "noise", *_row(K))
    return _arithmetic("step", "GuidedStep", given, (*_next(K), "guided_prediction"), K)


def start() -> GraphSpec:
    """Return the graph that makes the latents that the loop begins with: `p·image_latents + q·start_noise`."""
    return _arithmetic("start", "Start", ("image_latents", "start_noise", "p", "q"), ("latents",))


def blend() -> GraphSpec:
    """Return the graph that puts the image's latents back where inpainting keeps them."""
    given = ("next_latents", "image_latents", "start_noise", "mask", "next_p", "next_q")
    return _arithmetic("blend", "Blend", given, ("blended_latents",))


def enter(family: Family) -> GraphSpec:
    """Return the graph that lets a frame into a stream: its latents and embeds join those of the frames under way."""
    unet, names = family.graphs["unet"], embeds(family)

    def inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
        of_unet = unet.inputs(configs, shape)
        batch = {name: tensor for name in ("latents", *names) if (tensor := of_unet[name])}
        entering = {name: (dtype, (1, *size)) for name, (dtype, (_, *size)) in batch.items()}
        held = {STREAM + name: (dtype, (rows - 1, *size)) for name, (dtype, (rows, *size)) in batch.items()}
        return {**entering, **held}

    return GraphSpec(
        role="enter",
        component="",
        module="Enter",
        inputs=inputs,
        outputs=(*(ALL + name for name in ("latents", *names)), *(f"next_{STREAM}{name}" for name in names)),
        precision="fp32",
        of_rows=True,
    )


def stream_step() -> GraphSpec:
    """Return the graph with a sampler's row for each frame under way, with its own numbers; the finished frame
    leaves."""

    def inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
        batch = dict.fromkeys(("latents", "prediction", "noise"), latents(configs, shape))
        return {**batch, **dict.fromkeys(_row(1), ("float32", (shape.rows, 1, 1, 1)))}

    return GraphSpec(
        role="step",
        component="",
        module="StreamStep",
        inputs=inputs,
        outputs=("next_latents", f"next_{STREAM}latents"),
        precision="fp32",
        of_rows=True,
    )


def stream_stages(family: Family) -> tuple[Stage, ...]:
    """Return a stream's stages in place of a step's: they make one row for every frame under way."""
    reads = {name: ALL + name for name in ("latents", *embeds(family))}
    return (
        Stage("enter", "step", "state"),
        Stage("unet" + OF_STREAM, "step", "prediction", reads),
        Stage("step" + OF_STREAM, "step", "state", {"latents": reads["latents"]}),
    )


def kept(family: Family) -> dict[str, str]:
    """Return what a frame leaves behind in a stream → the held feed in which the next one finds it."""
    return {f"next_{STREAM}{name}": STREAM + name for name in ("latents", *embeds(family))}


def embeds(family: Family) -> list[str]:
    """Return what the UNet reads of the prompt."""
    return [name for stage in family.prompt_stages for name in family.graphs[stage.graph].outputs]


def _row(K: int) -> tuple[str, ...]:
    """Return the inputs that the table's row fills, and the history if there is one."""
    return ("m", "v", "w", "history") if K > 1 else ("m", "v", "w")


def _next(K: int) -> tuple[str, ...]:
    return ("next_latents", "next_history") if K > 1 else ("next_latents",)


def _arithmetic(role: str, module: str, given: tuple[str, ...], outputs: tuple[str, ...], K: int = 1) -> GraphSpec:
    """Return a graph without weights, in fp32; `given`: its inputs, most of which have the shape of the latents."""

    def inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
        dtype, (batch, channels, *size) = latents(configs, shape)
        shapes: dict[str, tuple[int, ...]] = {
            "m": (K, K),
            "v": (K,),
            "w": (K,),
            "history": (K - 1, batch, channels, *size),
            "mask": (batch, 1, *size),
            **dict.fromkeys(("guidance_scale", "p", "q", "next_p", "next_q"), (1,)),
        }
        return {name: (dtype, shapes.get(name, (batch, channels, *size))) for name in given}

    return GraphSpec(
        role=role,
        component="",
        module=module,
        inputs=inputs,
        outputs=outputs,
        arguments=lambda shape: (K,),
        precision="fp32",
    )


PLAIN_ENCODER = "vae_encoder+plain"
"""The encoder for a task whose pipelines read only the scaling_factor, if the family's others read more."""

STEP_DRAW = Draw("noise", "picture")
"""The draw that every step makes, in every chain."""


CLIP_SKIP = "+clip_skip"
"""How a text encoder's role ends if it leaves out its last layers."""

OF_STREAM = "+stream"
"""How the names of a stream's graphs end if other chains have their roles too."""

STREAM, ALL = "stream_", "all_"
"""How a stream's tensors are named: those of the frames under way, and those of all frames with the one that enters."""


def graphs(
    family: Family, K: int, posterior: bool, clip_skip: int = 0, ranks: Sequence[int] = ()
) -> dict[str, GraphSpec]:
    """Return role → spec for all graphs that the family's chains may have; each component's are in the order of
    tracing.

    `posterior`: whether the VAE makes a distribution. `clip_skip`: how many layers of the text encoders are left out.
    `ranks`: those of slots for adapters, ascending: each gets a UNet, and the text encoders have the largest in place
    of none.
    """
    of_text = {
        stage.graph: replace(family.graphs[stage.graph], rank=max(ranks, default=0)) for stage in family.prompt_stages
    }
    encoders = of_text if clip_skip else {}
    return {
        **family.graphs,
        **of_text,
        **{name: unet_with_slots(family, rank) for name, rank in slotted_unets(ranks).items()},
        **{
            role + CLIP_SKIP: replace(spec, role=role + CLIP_SKIP, arguments=lambda shape: (clip_skip,))
            for role, spec in encoders.items()
        },
        "vae_encoder": vae_encoder(family.vae_encoder, posterior),
        PLAIN_ENCODER: vae_encoder("VaeEncoder", posterior),
        "start": start(),
        "blend": blend(),
        "step": step(K),
        "step+guidance": guided_step(K),
        "enter": enter(family),
        "unet" + OF_STREAM: replace(family.graphs["unet"], of_rows=True),
        "step" + OF_STREAM: stream_step(),
    }


def slotted_unets(ranks: Sequence[int]) -> dict[str, int]:
    """Return the UNets' graphs with slots for adapters, by the roles that chains have for them → rank."""
    return {f"unet+lora-{rank}" if i else "unet+lora": rank for i, rank in enumerate(ranks)}


def unet_with_slots(family: Family, rank: int) -> GraphSpec:
    """Return the UNet with slots of this rank, and with the columns that they read."""
    plain = family.graphs["unet"]

    def inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
        return {**plain.inputs(configs, shape), **dict.fromkeys(family.slot_columns)}

    return replace(plain, inputs=inputs, rank=rank)


def slot_wires(role: str) -> dict[str, str]:
    """Return a chain's names for the inputs of a graph's slots: unet_lora_down, unet_lora_down_128, …"""
    name, _, rank = role.replace("+lora", "").replace("+", "_").partition("-")
    return {end: f"{name}_{end}" + (f"_{rank}" if rank else "") for end in ("lora_down", "lora_up")}


def step_feeds(family: Family, slots: bool = False) -> dict[str, Feed]:
    """Return the feeds of the UNet and the sampler's step, which every chain has; `slots`: of a UNet with slots too."""
    columns = ("input_scale", *family.columns, *(family.slot_columns if slots else ()), "m", "v", "w")
    return {
        "noise": Feed("noise", "step"),
        **{name: Feed("column", "call") for name in family.constants},
        **{name: Feed("column", "step") for name in columns},
    }


def check(configs: Mapping[str, Any], addition: str | None = None) -> list[str]:
    """Return what no graph here can express in these configs, as phrases."""
    unet, vae = configs["unet"], configs["vae"]
    wanted = {
        "addition_embed_type": addition,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_embedding_type": "positional",
    }
    problems = [
        f"the UNet has {key}={unet.get(key, default)!r}, supported is {default!r}"
        for key, default in wanted.items()
        if unet.get(key, default) != default
    ]
    if unet["in_channels"] == 9:
        problems.append(
            "the UNet reads 9 channels, those of a mask and of the masked image too, and one that reads the latents' 4 "
            "was expected: for inpainting, build a checkpoint for text-to-image with --tasks inpainting"
        )
    elif unet["in_channels"] != unet["out_channels"]:
        problems.append(f"the UNet reads {unet['in_channels']} channels and predicts {unet['out_channels']}")
    if (reduces := vae.get("upsampling_scaling_factor", 2) ** (len(decoder_channels(vae)) - 1)) != 8:
        problems.append(f"the VAE reduces by {reduces}, supported is 8")
    elif (taken := 2 ** (len(decoder_channels(vae)) - 1)) != 8:
        problems.append(f"the VAE reduces by 8, and diffusers' pipelines take it for {taken} by its number of blocks")
    return problems
