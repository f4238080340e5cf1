"""SnapFusion at full size: Stable Diffusion 1.5 in sixteen steps, and its evolved UNet in eight, at 512 px.

    snapgen plan  --config=configs/snapfusion/steps.py:sixteen --topology=v5e:16x16
    snapgen train --config=configs/snapfusion/steps.py:sixteen --workdir=gs://BUCKET/sixteen \
        --config.data.path=PHOTOS --config.init_from=gs://BUCKET/sd15_v --config.teacher.workdir=gs://BUCKET/sd15_v
    snapgen train --config=configs/snapfusion/steps.py:evolved_sixteen --workdir=gs://BUCKET/evolved_sixteen \
        --config.data.path=PHOTOS --config.init_from=gs://BUCKET/evolved --config.teacher.workdir=gs://BUCKET/sd15_v
    snapgen train --config=configs/snapfusion/steps.py:eight --workdir=gs://BUCKET/eight --config.data.path=PHOTOS \
        --config.init_from=gs://BUCKET/evolved_sixteen --config.teacher.workdir=gs://BUCKET/sixteen
    snapgen train --config=configs/snapfusion/steps.py:runlocal --workdir=/tmp/eight

The last stage's teacher is Stable Diffusion 1.5 in its sixteen steps, and its student begins as the evolved UNet in its
own (section 4.3 and appendix D of arXiv 2306.00980). `configs/snapfusion/robust.py` trains what these begin with: the
runs `sd15_v` and `evolved`, which predict v.

Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute. Metric: the fixed-noise validation loss; FID and CLIP
score of COCO captions. The batch is the paper's; it says neither learning rate nor length.
"""

from ml_collections import ConfigDict

from configs.snapfusion import robust

FORMS = {"sixteen": (16, "sd15"), "evolved_sixteen": (16, "snapfusion"), "eight": (8, "snapfusion")}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "sixteen" for Stable Diffusion 1.5, "evolved_sixteen" and "eight" for the evolved UNet, None for "eight";
    or "runlocal" for six updates of tiny networks on a laptop."""
    form = arg or "eight"
    if form not in (*FORMS, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are {', '.join(FORMS)} and runlocal, or nothing")
    steps, preset = FORMS.get(form, (8, "snapfusion"))
    c = robust.experiment(preset)
    c.recipe = "step_distillation"
    if preset == "snapfusion":
        c.mesh.fsdp = 2  # it is smaller, and fits so
    c.train_steps = 20_000
    c.teacher = ConfigDict({"network": {"kind": "sd_unet", "preset": "sd15"}, "prediction": "v"})
    c.teacher.schedule = robust.schedule()
    c.sampling = ConfigDict({"steps": steps, "guidance": 7.5})
    c.guided_share, c.guidance_range, c.original_weight = 0.1, (2.0, 14.0), 0.2
    if form == "runlocal":
        robust.run_locally(c)
        c.teacher.random = True
        c.teacher.network = ConfigDict(c.network.to_dict())
        c.sampling.steps = 2
    return c
