"""Configuration of HLA: a Llama whose attention caches low-rank latents. Written by `hla convert`."""

from transformers import LlamaConfig


class HlaConfig(LlamaConfig):
    """A Llama's configuration and, under `hla`, how the latents carry positions and the sizes of every layer.

    hla = {
        "format_version": 1,
        "rope": "original" | "latent" | "paper",
        "rotary_fraction": share of the latent pairs that turn (paper; default 1),
        "latent_bias": k_up and kv_up have biases (default: attention_bias),
        "output_bias": o_proj has a bias (default: attention_bias),
        "layers": [{
            "fast_frequencies": c, keys of the first c frequencies come from the k latent, others from the kv latent,
            "k_rank": floats of the k latent (original, paper),
            "k_ranks": complex numbers of the k latent by frequency (latent),
            "kv_rank": floats of the kv latent,
            "q_rank": 0 where q_proj is whole,
        }, …]
    }
    """

    model_type = "hla"
    base_model_tp_plan = None  # Llama's names tensors that are not here

    def __init__(self, hla=None, rope_parameters=None, **kwargs):
        if rope_parameters and not hasattr(LlamaConfig, "rope_parameters"):  # transformers 4 has its older form only
            scaling = dict(rope_parameters)
            kwargs["rope_theta"] = scaling.pop("rope_theta", 10000.0)
            kwargs["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        elif rope_parameters:
            kwargs["rope_parameters"] = rope_parameters
        kwargs.pop("sliding_window", None)  # only ever there unused, yet caches would be cut to it
        super().__init__(**kwargs)
        self.hla = hla
