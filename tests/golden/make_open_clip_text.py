"""Record what open_clip's text encoders compute, with weights that any machine can repeat.

    pip install --no-deps --target FOLDER open_clip_torch==3.3.0
    PYTHONPATH=FOLDER:. python -m tests.golden.make_open_clip_text

torchvision, which open_clip imports for images, is replaced by an empty module here: its operators
do not load next to the CPU build of torch, and no text passes through them. `open_clip_text.json`
holds the states of all tokens and the projected vector of each text, for each form of FORMS.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = Path(__file__).with_name("open_clip_text.json")
WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY, EMBED = 12, 2, 2, 8, 300, 6
END = VOCABULARY - 1
TOKENS = [[298, 5, 17, END, 0, 0, 0, 0], [298, END, 0, 0, 0, 0, 0, 0], [298, 9, 8, 7, 6, 5, 4, END]]
FORMS: dict[str, dict[str, Any]] = {
    "gelu": {"mlp_ratio": 4.0, "quick_gelu": False},
    "quick_gelu": {"mlp_ratio": 2.5, "quick_gelu": True},
}


def weights(mlp_ratio: float) -> dict[str, Tensor]:
    """The tensors of a text encoder under open_clip's names; cosines of their indices."""
    hidden = int(WIDTH * mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (LENGTH, WIDTH),
        "text_projection": (WIDTH, EMBED),
        "token_embedding.weight": (VOCABULARY, WIDTH),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
    }
    for n in range(LAYERS):
        block = {
            "ln_1.weight": (WIDTH,),
            "ln_1.bias": (WIDTH,),
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "ln_2.weight": (WIDTH,),
            "ln_2.bias": (WIDTH,),
            "mlp.c_fc.weight": (hidden, WIDTH),
            "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (WIDTH, hidden),
            "mlp.c_proj.bias": (WIDTH,),
        }
        shapes |= {f"transformer.resblocks.{n}.{name}": shape for name, shape in block.items()}
    made = {}
    for place, (name, shape) in enumerate(sorted(shapes.items())):
        count = torch.Size(shape).numel()
        values = torch.cos(torch.arange(count, dtype=torch.float64) * (1.37 + 0.11 * place) + place)
        made[name] = (0.4 * values).reshape(shape).float()
    return made


def _text_transformer() -> Any:
    """Its class, without the package's other modules."""
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["torchvision.ops.misc"])["FrozenBatchNorm2d"] = torch.nn.Identity
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["open_clip"] = package
    return importlib.import_module("open_clip.transformer")


def main() -> None:
    """Write RECORD."""
    library = _text_transformer()
    tokens, record = torch.tensor(TOKENS), {}
    for name, form in FORMS.items():
        network = library.TextTransformer(
            context_length=LENGTH,
            vocab_size=VOCABULARY,
            width=WIDTH,
            heads=HEADS,
            layers=LAYERS,
            mlp_ratio=form["mlp_ratio"],
            output_dim=EMBED,
            act_layer=library.QuickGELU if form["quick_gelu"] else torch.nn.GELU,
            output_tokens=True,
        ).eval()
        network.load_state_dict(weights(form["mlp_ratio"]))
        with torch.no_grad():
            pooled, states = network(tokens)
        record[name] = {"states": states.tolist(), "pooled": pooled.tolist()}
    RECORD.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
