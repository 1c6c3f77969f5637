"""Skin tones of emoji: are they those of the prompts, for roles never seen in that tone?

    python -m benchmarks.emoji_results write FOLDER
    python -m benchmarks.emoji_results score RUN FOLDER [images] [guidance scales, comma-separated]

`write` makes FOLDER/seen and FOLDER/held-out, images with captions of the emoji of one person with
one of five skin tones; one (role, tone) in ten is held out, by the sha256 of its caption. `score`
draws the held-out captions with a run that was trained on FOLDER/seen. A palette of five colours
is taken from the seen images: where the five tones of a role differ. An image has the tone whose
colour most of its pixels are near. The share of images with the right tone is printed for the real
held-out images and for each guidance scale, and FOLDER gets a picture. DDPM_RAY_ASSETS names the
assets. One process, no Ray.
"""

import hashlib
import io
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

import ddpm_ray
from benchmarks.results import sheet
from ddpm_ray.sampling.sampling import Images

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CODES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
SIDE = 128  # of the files
IMAGES, SCALES, SHOWN = 120, (1.0, 2.0, 4.0), 10
NEAR = 20.0  # distance in RGB within which a pixel has a tone's colour
APART = 24.0  # standard deviation over the tones above which a pixel shows skin

Roles = dict[str, dict[int, str]]  # by role: the file of each tone


def roles() -> Roles:
    """The roles of one person with one tone: by caption without the tone, files by tone."""
    table = Path(os.environ["DDPM_RAY_ASSETS"], "noto_emoji_captions.tsv").read_text("utf-8")
    found: Roles = defaultdict(dict)
    for row in table.splitlines()[1:]:
        file, caption = row.split("\t")
        tones = [n for n, code in enumerate(CODES) if code in file]
        if len(tones) == 1 and file.count("1f3f") == 1:
            (tone,) = tones
            found[caption.replace(f" {TONES[tone]} skin tone", "")][tone] = file
    return {role: files for role, files in found.items() if len(files) == len(TONES)}


def caption_of(role: str, tone: int) -> str:
    """The caption of a role in a tone, the tone last."""
    return f"{role}, {TONES[tone]} skin tone"


def is_held_out(role: str, tone: int) -> bool:
    """One in ten."""
    return hashlib.sha256(caption_of(role, tone).encode()).digest()[0] < 26


def write(folder: Path) -> None:
    """Write both sets as PNG files with captions.tsv."""
    archive = np.load(Path(os.environ["DDPM_RAY_ASSETS"], "noto_emoji_128_png.npz"))
    data, offsets = archive["data"], archive["offsets"]
    place = {str(name): n for n, name in enumerate(archive["names"])}
    lines: dict[bool, list[str]] = {False: [], True: []}
    for role, files in sorted(roles().items()):
        for tone, file in sorted(files.items()):
            held = is_held_out(role, tone)
            out = folder / ("held-out" if held else "seen")
            out.mkdir(parents=True, exist_ok=True)
            n = place[file]
            (out / file).write_bytes(data[offsets[n] : offsets[n + 1]].tobytes())
            lines[held].append(f"{file}\t{caption_of(role, tone)}")
    for held, rows in lines.items():
        target = folder / ("held-out" if held else "seen") / "captions.tsv"
        target.write_text("\n".join(["file\tcaption", *rows]) + "\n", "utf-8")
        print(f"{target}: {len(rows)} images")


def pixels(file: Path, side: int) -> npt.NDArray[np.uint8]:
    """The image on white, reduced to `side` by averaging, as packing does."""
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        white = Image.new("RGBA", image.size, "white")
        flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return np.asarray(flat.resize((side, side), Image.Resampling.BOX))


def palette(folder: Path) -> npt.NDArray[np.float32]:
    """The five colours [5, 3] of skin, medians over the seen roles that have all tones."""
    colours = []
    for role, files in sorted(roles().items()):
        if any(is_held_out(role, tone) for tone in files):
            continue
        tones = np.stack([pixels(folder / "seen" / files[n], SIDE) for n in range(len(TONES))])
        skin = tones.std(0).mean(-1) > APART
        if skin.any():
            colours.append(np.median(tones[:, skin], axis=1))
    return np.median(colours, axis=0).astype(np.float32)


def found_tones(images: Images, colours: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The tone [N] of each image."""
    far = np.linalg.norm(images[..., None, :].astype(np.float32) - colours, axis=-1)
    nearest = far.argmin(-1)
    near = far.min(-1) < NEAR
    counts = [((nearest == n) & near).sum((1, 2)) for n in range(len(TONES))]
    return np.asarray(np.stack(counts, 1).argmax(1), np.int64)


def score(url: str, folder: Path, count: int, scales: list[float]) -> None:
    """Print the shares and write the picture."""
    model = ddpm_ray.load(url, "cpu")
    side = model.image_size[0]
    pairs = [
        (role, tone, files[tone])
        for role, files in sorted(roles().items())
        for tone in sorted(files)
        if is_held_out(role, tone)
    ]
    spread = [pairs[n * len(pairs) // count] for n in range(min(count, len(pairs)))]
    wanted = np.array([tone for _, tone, _ in spread])
    colours = palette(folder)
    real = np.stack([pixels(folder / "held-out" / file, side) for *_, file in spread])
    print(f"{len(spread)} of {len(pairs)} held-out captions; % with the right tone, chance 20")
    print(f"real   {100 * (found_tones(real, colours) == wanted).mean():.1f}", flush=True)
    rows = {"real": [real[:SHOWN]]}
    prompts = [caption_of(role, tone) for role, tone, _ in spread]
    for scale in scales:
        images = model.sample(len(spread), prompts=prompts, guidance_scale=scale)
        share = (found_tones(images, colours) == wanted).mean()
        print(f"{scale:5g}  {100 * share:.1f}", flush=True)
        rows[f"scale {scale:g}"] = [images[:SHOWN]]
    sheet(rows, ["held-out tones of roles"]).save(folder / "emoji-tones.png")
    for prompt in prompts[:SHOWN]:
        print(prompt)


if __name__ == "__main__":
    job, *given = sys.argv[1:]
    if job == "write":
        write(Path(given[0]))
    else:
        amount = int(given[2]) if len(given) > 2 else IMAGES
        swept = [float(one) for one in given[3].split(",")] if len(given) > 3 else list(SCALES)
        score(given[0], Path(given[1]), amount, swept)
