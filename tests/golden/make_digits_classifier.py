"""Train ddpm_ray/evaluation/features/digits_classifier.safetensors and record what came out.

    python tests/golden/make_digits_classifier.py      (a minute on one core)

Every fifth of scikit-learn's 1,797 scans is held out: the file is trained on the other four
fifths, so that the accuracy recorded beside this script is true of the very weights that judge.
One thread and fixed seeds repeat the file's bits on the same kind of processor; on another kind
the last digits of the weights may differ, and the sha256 with them.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.evaluation.features.digits_classifier import SIDE, WEIGHTS, DigitsClassifier

RECORD = Path(__file__).with_name("digits_classifier.json")
EPOCHS, BATCH, SEED = 200, 64, 0


def scans() -> tuple[Tensor, Tensor]:
    """Images uint8 [1797, 8, 8, 1], the scans' 0..16 spread over 0..255, and labels int64."""
    digits = load_digits()
    images = (torch.from_numpy(digits.images) * 255 / 16).round().to(torch.uint8)
    return images[..., None], torch.from_numpy(digits.target)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, black moving in."""
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    corners = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([padded[i, y : y + SIDE, x : x + SIDE] for i, (y, x) in enumerate(corners)])


def noisy(images: Tensor, spread: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise added, its standard deviation `spread` [N] in grey levels."""
    noise = torch.randn(images.shape, generator=generator) * spread.view(-1, 1, 1, 1)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor) -> Tensor:
    flat = images.permute(0, 3, 1, 2).float()
    return F.avg_pool2d(flat, 3, 1, 1).permute(0, 2, 3, 1).round().to(torch.uint8)


def garbage(images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Kinds of images that are no digit, as a poor generator draws them: at most N of each."""
    order = torch.randperm(len(images), generator=generator)
    differ = labels != labels[order]  # half one 3 and half another is still a 3
    ours, others = images[differ], images[order][differ]
    pixels = torch.randperm(SIDE * SIDE, generator=generator)
    chaos = torch.randint(0, 256, images.shape, generator=generator).to(torch.uint8)
    halves = torch.cat([ours[:, : SIDE // 2], others[:, SIDE // 2 :]], dim=1)
    return {
        "chaos": chaos,
        "dark_chaos": ((chaos / 255) ** 3 * 255).to(torch.uint8),  # mostly black, as scans are
        "blurred_chaos": blurred(chaos),
        "scrambled": images.flatten(1)[:, pixels].view_as(images),
        "blended": ((ours.int() + others) // 2).to(torch.uint8),
        "blurred_halves": blurred(blurred(halves)),
        "drowned": noisy(images, torch.full((len(images),), 120.0), generator),
    }


def train(images: Tensor, labels: Tensor) -> DigitsClassifier:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for picked in order[: steps // EPOCHS * BATCH].view(-1, BATCH):
            clear = shifted(images[picked], generator)
            clear = noisy(clear, 12 * torch.rand(BATCH, generator=generator), generator)
            poor = torch.cat([*garbage(images[picked], labels[picked], generator).values()])
            poor = poor[torch.randperm(len(poor), generator=generator)[:BATCH]]
            logits = classifier.logits(torch.cat([clear, poor]))
            sure = F.cross_entropy(logits[:BATCH], labels[picked])
            unsure = -F.log_softmax(logits[BATCH:], dim=1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(sure + 0.15 * unsure)
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def report(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares on held-out scans: right, right and >= 0.9 sure, and garbage that is >= 0.9 sure."""
    confidence, answer = classifier.logits(images).softmax(1).max(1)
    right = answer == labels
    poor = garbage(images, labels, torch.Generator().manual_seed(SEED + 1))
    shares = {
        "accuracy": right.float().mean(),
        "right_and_confident": (right & (confidence >= 0.9)).float().mean(),
        "wrong_and_confident": (~right & (confidence >= 0.9)).float().mean(),
    }
    for name, kind in poor.items():
        sure = classifier.logits(kind).softmax(1).amax(1) >= 0.9
        shares[f"confident_on_{name}"] = sure.float().mean()
    return {name: round(share.item(), 4) for name, share in shares.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = scans()
    held_out = torch.arange(len(images)) % 5 == 0
    classifier = train(images[~held_out], labels[~held_out])
    shares = report(classifier, images[held_out], labels[held_out])
    save_file(classifier.state_dict(), WEIGHTS)
    record = {"sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(), "held_out": shares}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main()
