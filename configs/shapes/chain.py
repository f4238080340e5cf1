"""The method of SnapGen in the shapes world, from nothing: an autoencoder and a tiny decoder for its latents, CLIP,
teacher, student, distilled student, four steps.

    snapgen chain --config=configs/shapes/chain.py --workdir=chain
    snapgen chain --config=configs/shapes/chain.py --workdir=chain --config.student.train_steps=8000
    snapgen quickstart --chain --workdir=chain        # chain.py:quick, twenty minutes

Every stage is a config of its own beside this one, trained in `WORKDIR/STAGE`; a chain that was stopped goes on where
it was. The short forms draw patches of pixels in place of latents, and so have neither autoencoder nor decoder, and
"quick" a simpler world. The distilled student starts from the student; beside it stands the student after as many
further updates by itself.
Machine: one GPU; `quick`, two CPU cores for twenty minutes. Metric: the table at the end, in which a row stands
beside the one that it is to better.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick" for twenty minutes; "runlocal" for the whole chain in small."""
    if arg not in (None, "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is quick, runlocal, or nothing")
    latents = {} if arg else {"inputs.codec.workdir": "autoencoder"}
    text, teacher = {"inputs.text_workdir": "clip", **latents}, {"teacher.workdir": "teacher"}
    further = {**text, **teacher, "init_from": "student"}
    distilled = {"init_from": "student_distilled"}
    unguided = {"steps": 4, "guidance": 1.0}

    def stage(name: str, earlier: dict, *rows: dict, of: str = "") -> dict:
        config = f"{of or name}.py" + (f":{arg}" if arg else "")
        return {"name": name, "config": config, "earlier": earlier, "rows": rows}

    last = {"label": "few-step, 4 steps", "against": "distilled, 4 steps"}
    phone = {"label": "few-step, 4 steps, tiny decoder", "decoder": "tiny_decoder", "against": last["label"]}
    codec = () if arg else (stage("autoencoder", {}), stage("tiny_decoder", latents))
    return ConfigDict(
        {
            "stages": (
                *codec,
                stage("clip", {}),
                stage("teacher", text, {"label": "teacher"}),
                stage("student", text, {"label": "student"}),
                stage(
                    "student_further",
                    {**text, "init_from": "student"},
                    {"label": "student, as many updates further"},
                    of="student",
                ),
                stage(
                    "student_distilled",
                    further,
                    {"label": "distilled", "against": "student, as many updates further"},
                    {"label": "distilled, 4 steps", "options": unguided},
                ),
                stage("student_few_step", {**text, **teacher, **distilled}, last, *([] if arg else [phone])),
            ),
            "scores": ("compositional", "frechet", "diversity", "clip_score"),
            "per_category": {None: 64, "quick": 32, "runlocal": 2}[arg],
            **({"categories": ("single_object", "colours")} if arg == "quick" else {}),
            "examples": {None: 512, "quick": 128, "runlocal": 8}[arg],
        }
    )
