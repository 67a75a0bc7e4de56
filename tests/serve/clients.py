"""The requests of existing clients, as their sources build them with default settings.

SillyTavern: src/endpoints/stable-diffusion.js and public/scripts/extensions/stable-diffusion/index.js.
Open WebUI: backend/open_webui/routers/images.py. LibreChat: StableDiffusion.js and OpenAIImageTools.js of
api/app/clients/tools/structured.
"""

from typing import Any

SILLYTAVERN: dict[str, Any] = {
    "url": "http://localhost:7860",
    "auth": "",
    "prompt": "best quality, absurdres, aesthetic, a cat",
    "negative_prompt": "lowres, bad anatomy, bad hands, text, error",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.0,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
    "alwayson_scripts": {"ADetailer": {"args": [True, True, {"ad_model": "face_yolov8n.pt"}]}},
}
SILLYTAVERN_LISTS = {
    "upscalers": "name",
    "latent-upscale-modes": "name",
    "sd-vae": "model_name",
    "sd-modules": "model_name",
    "samplers": "name",
    "schedulers": "name",
    "sd-models": "title",
}
"""What it lists: the route, and the field of each entry that it reads."""

OPEN_WEBUI_A1111: dict[str, Any] = {
    "prompt": "a cat",
    "batch_size": 2,
    "width": 512,
    "height": 512,
    "steps": 50,
    "negative_prompt": "blurry",
}
OPEN_WEBUI_GENERATION: dict[str, Any] = {
    "model": "dall-e-2",
    "prompt": "a cat",
    "n": 1,
    "size": "512x512",
    "response_format": "b64_json",
}
OPEN_WEBUI_EDIT = {
    "model": "dall-e-2",
    "prompt": "a dog",
    "n": "1",
    "size": "1024x1024",
    "background": "transparent",
    "response_format": "b64_json",
}
"""A form; its picture is `image`, or `image[]` if it was a list."""

LIBRECHAT_A1111: dict[str, Any] = {
    "prompt": "a cat, oil painting, detailed fur, green eyes, soft light, portrait, canvas",
    "negative_prompt": "semi-realistic, cgi, 3d, render, sketch, cartoon, ugly",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
LIBRECHAT_GENERATION: dict[str, Any] = {
    "model": "gpt-image-1",
    "prompt": "a cat",
    "n": 1,
    "background": "auto",
    "output_format": "png",
    "quality": "auto",
    "size": "auto",
}
LIBRECHAT_EDIT = {"model": "gpt-image-1", "prompt": "a dog", "quality": "auto", "size": "auto"}
"""A form; its pictures are `image[]`."""
