"""LazyDiT from nothing: a DiT, the price at which its gates skip a wanted share of the module calls, and those gates.

    snapgen chain --config=configs/shapes/lazy_chain.py --workdir=lazy
    snapgen chain --config=configs/shapes/lazy_chain.py --workdir=lazy --config.rho.share=0.2

Run it where this repository is. Machine: two CPU cores. Time: an hour, most of it for the DiT; `quick`, half of that.
Metric: `deviation.grey_levels`, how far skipping leads from the full sampler; and the scores, which stay.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `lazy_base.py`."""
    form = f":{arg}" if arg else ""
    search = {"config": f"configs/shapes/lazy.py{form}", "share": 0.3, "trainings": 1 if arg == "runlocal" else 6}
    price = {"rho_attention": "rho.rho", "rho_ffn": "rho.rho"}
    return ConfigDict(
        {
            "stages": (
                {"name": "base", "config": f"lazy_base.py{form}", "rows": ({"label": "DiT"},)},
                {
                    "name": "rho",
                    "derive": "snapgen_jax.derivations.lazy_rho:find",
                    "earlier": {"base": "base"},
                    "options": search,
                    "example": {"rho": 1e-3, "share": 0.3},
                },
                {
                    "name": "gates",
                    "config": f"lazy.py{form}",
                    "earlier": {"base": "base"},
                    "filled": price,
                    "rows": ({"label": "with gates", "against": "DiT"},),
                },
            ),
            "scores": ("compositional", "diversity"),
            "per_category": 2 if arg == "runlocal" else 64,
            **({"categories": ("single_object", "colours")} if arg == "quick" else {}),
        }
    )
