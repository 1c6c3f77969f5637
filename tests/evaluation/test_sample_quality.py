"""Scores equal what scipy and scikit-learn make of the same features, on any number of workers."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import polynomial_kernel
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import InceptionResize
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import quadratic_steps, uniform_steps
from ddpm_ray.evaluation.alignment import Alignment
from ddpm_ray.evaluation.feature_metrics import OptionalMetrics, metric_names
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet, digits_net, inception_net
from ddpm_ray.evaluation.features.inception import Inception
from ddpm_ray.evaluation.frechet import frechet_distance_of_features
from ddpm_ray.evaluation.precision_recall import precision_recall
from ddpm_ray.evaluation.reference_statistics import Reference, reference
from ddpm_ray.evaluation.sample_quality import SampleSet, Scores, evaluate_samples
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw
from ddpm_ray.storage import object_store
from tests.evaluation.test_alignment import PROMPTS, Angles
from tests.noise import pack

OnWorkers = Callable[[int, Callable[[Workers], Any]], list[Any]]  # see conftest.py
SCHEDULE = NoiseSchedule(schedules.cosine(20))
PLAN = SamplingPlan(uniform_steps(20, 3), SamplingSettings(seed=5))
SHAPE = ImageShape(6, 6, 1)


def random_images(count: int, seed: int = 0) -> Images:
    ground = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 1))
    return (ground * np.linspace(0.2, 1, 6)[None, :, None, None]).astype(np.uint8)


def projection(width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(width).normal(size=(36, width)) / 1000


def features_of(images: Images, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.tanh(images.reshape(len(images), -1) @ projection(width))


def net(*widths: int, name: Any = "inception", sha256: str = "a" * 64) -> FeatureNet:
    def extract(images: Tensor) -> dict[int, Tensor]:
        return {w: torch.from_numpy(features_of(images.numpy(), w)).float() for w in widths}

    return FeatureNet(name, widths, extract, {"weights_sha256": sha256, "resize": "none"})


def blind(x_t: Tensor, t: Tensor) -> Tensor:
    """A pointwise denoiser: its images do not depend on how they were batched."""
    return 0.6 * x_t


def score(
    feature_net: FeatureNet, truth: Reference, workers: Workers | None = None, **changes: Any
) -> Scores:
    arguments: dict[str, Any] = {
        "denoise": blind,
        "plan": PLAN,
        "num_images": 40,
        "batch_size": 16,
        "image_shape": SHAPE,
        "weights": {"step": 7, "ema_decay_per_step": 0.99},
        **changes,
    }
    denoiser = Denoiser.of_noise(arguments.pop("denoise"), SCHEDULE)
    others = {key: changes[key] for key in ("optional_metrics", "held_out") if key in changes}
    described = {key: value for key, value in arguments.items() if key not in others}
    samples = SampleSet(denoiser, **described)
    return evaluate_samples(samples, feature_net, truth, workers or Workers(), **others)


def frechet_by_scipy(a: Any, b: Any) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(cov_a + cov_b) - 2 * np.trace(sqrtm(cov_a @ cov_b)).real)


def kernel_by_sklearn(a: Any, b: Any) -> float:
    def mean_over_pairs(x: Any) -> float:
        kernel = polynomial_kernel(x, degree=3, gamma=1 / x.shape[1], coef0=1)
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    cross = polynomial_kernel(a, b, degree=3, gamma=1 / a.shape[1], coef0=1)
    return mean_over_pairs(a) + mean_over_pairs(b) - 2 * float(cross.mean())


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_a_reference_is_that_of_all_images_on_any_number_of_workers(
    on_workers: OnWorkers, workers: int, tmp_path: Path
) -> None:
    images = random_images(100)
    dataset = pack(tmp_path, images, [30, 1, 50, 19])
    found = on_workers(
        workers, lambda w: reference(dataset, net(4, 8), w, kernel_images=10, batch_size=7)
    )
    for one in found:
        assert one.count == 100
        assert one.image_shape == SHAPE
        for width in (4, 8):
            expected = features_of(images, width)
            moments = one.moments[width]
            np.testing.assert_allclose(moments.mean(), expected.mean(0), atol=1e-7)
            np.testing.assert_allclose(
                moments.covariance(), np.cov(expected, rowvar=False), atol=1e-7
            )
            np.testing.assert_allclose(one.kept[width], expected[::10], atol=1e-6)


@pytest.mark.parametrize("num_images", [40, 7], ids=["more than features", "fewer"])
def test_scores_are_what_scipy_and_sklearn_make_of_the_same_samples(
    num_images: int, tmp_path: Path
) -> None:
    images = random_images(60)
    feature_net = net(8)
    truth = reference(pack(tmp_path, images, [60]), feature_net, Workers(), kernel_images=5)
    drawn = PIXELS.decode(
        draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, torch.arange(num_images), SHAPE, "cpu")
    )
    samples = features_of(drawn, 8)
    metrics = score(feature_net, truth, num_images=num_images).metrics
    ends = {"eval/fid8_low", "eval/fid8_high"} if num_images >= 20 else set()
    assert metrics.keys() == {"eval/fid8", "eval/kid8"} | ends
    # scipy's root of a singular product is good to 7 digits only
    expected = frechet_by_scipy(features_of(images, 8), samples)
    assert metrics["eval/fid8"] == pytest.approx(expected, rel=1e-6 if num_images > 8 else 1e-5)
    expected = kernel_by_sklearn(features_of(images, 8)[::12], samples[:5])
    assert metrics["eval/kid8"] == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("width", [8, 64], ids=["more than features", "fewer"])
def test_the_interval_is_of_the_scores_without_each_tenth_sample(
    width: int, tmp_path: Path
) -> None:
    """From the samples themselves: scipy's distance of what is left, ten times."""
    images, feature_net = random_images(90), net(width)
    truth = reference(pack(tmp_path, images, [90]), feature_net, Workers())
    drawn = PIXELS.decode(
        draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, torch.arange(40), SHAPE, "cpu")
    )
    metrics = score(feature_net, truth).metrics
    known, seen = (features_of(each, width) for each in (images, drawn))
    left = [frechet_by_scipy(known, seen[np.arange(40) % 10 != group]) for group in range(10)]
    error = (9 * np.var(left)) ** 0.5
    ends = metrics[f"eval/fid{width}_low"], metrics[f"eval/fid{width}_high"]
    middle = metrics[f"eval/fid{width}"]
    half = stats.t.ppf(0.975, 9) * error
    assert ends == pytest.approx((max(0, middle - half), middle + half), rel=1e-4)


def test_fewer_samples_than_features_are_scored_to_twelve_digits(tmp_path: Path) -> None:
    """Covariances alone would give seven: that of the samples is singular."""
    images, feature_net = random_images(200), net(32)
    truth = reference(pack(tmp_path, images, [200]), feature_net, Workers())
    drawn = PIXELS.decode(
        draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, torch.arange(8), SHAPE, "cpu")
    )
    both = [feature_net(torch.from_numpy(each))[32] for each in (images, drawn)]
    metrics = score(feature_net, truth, num_images=8).metrics
    expected = frechet_distance_of_features(*both)  # from the vectors; no covariance is formed
    assert metrics["eval/fid32"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("num_images", [40, 4])
def test_scores_do_not_depend_on_the_number_of_workers(
    on_workers: OnWorkers, workers: int, num_images: int, tmp_path: Path
) -> None:
    feature_net = replace(net(8, name="digits"), classify=lambda features: features[8] * 20)
    truth = reference(
        pack(tmp_path / "a", random_images(60), [60]), feature_net, Workers(), kernel_images=9
    )
    others = reference(pack(tmp_path / "b", random_images(50, 1), [50]), feature_net, Workers())
    wanted: dict[str, Any] = {
        "num_images": num_images,
        "optional_metrics": OptionalMetrics(precision_recall=True, extrapolate=num_images >= 40),
        "held_out": others,
    }
    alone = score(feature_net, truth, **wanted)
    assert 0 < alone.metrics["eval/recognised"] < 1
    assert {"eval/precision_digits", "eval/fd_digits_held_out"} <= alone.metrics.keys()
    together = on_workers(workers, lambda w: score(feature_net, truth, w, batch_size=5, **wanted))
    for one in together:
        assert one.metrics == pytest.approx(alone.metrics, rel=1e-11)
        assert one.provenance == alone.provenance


def test_a_reference_is_computed_once(tmp_path: Path) -> None:
    dataset = pack(tmp_path, random_images(30), [10, 20])
    first = reference(dataset, net(4), Workers(), kernel_images=6)
    seen = replace(net(4), extract=lambda images: pytest.fail("computed again"))
    again = reference(dataset, seen, Workers(), kernel_images=6)
    assert_same(again, first)
    assert [path.name for path in (tmp_path / "reference").iterdir()] == [
        f"{first.sha256}.safetensors"
    ]


def assert_same(one: Reference, other: Reference) -> None:
    assert one.identity == other.identity
    for width, moments in one.moments.items():
        for mine, theirs in zip(moments.tensors(), other.moments[width].tensors(), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(one.kept[width], other.kept[width])


def test_whatever_a_reference_depends_on_makes_it_another(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "a", random_images(30), [30])
    other = pack(tmp_path / "b", random_images(30, seed=1), [30])
    resized = replace(net(4), identity={**net(4).identity, "resize": "original"})
    names = [
        reference(data, feature_net, Workers(), kernel_images=kept).sha256
        for data, feature_net, kept in (
            (dataset, net(4), 5),
            (other, net(4), 5),
            (dataset, net(4, 8), 5),
            (dataset, net(4, name="digits"), 5),
            (dataset, net(4, sha256="b" * 64), 5),
            (dataset, resized, 5),
            (dataset, net(4), 6),
        )
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("place", ["start", "header", "numbers", "cut", "empty"])
def test_a_damaged_cache_is_never_used(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = pack(tmp_path, random_images(30), [30])
    first = reference(dataset, net(4), Workers(), kernel_images=6)
    (path,) = (tmp_path / "reference").iterdir()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if place in ("cut", "empty"):
        damaged = damaged[: len(whole) // 2 if place == "cut" else 0]
    else:
        position = {"start": 0, "header": whole.index(b"shape"), "numbers": len(whole) - 9}[place]
        damaged[position] ^= 1
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert_same(reference(dataset, net(4), Workers(), kernel_images=6), first)
    assert "cannot be used" in caplog.text
    assert path.read_bytes() == whole


def test_a_cache_under_another_name_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = pack(tmp_path, random_images(30), [30])
    first = reference(dataset, net(4), Workers())
    other = reference(dataset, net(4, sha256="b" * 64), Workers())
    folder = tmp_path / "reference"
    (folder / f"{other.sha256}.safetensors").rename(folder / f"{first.sha256}.safetensors")
    reference(dataset, net(4), Workers())
    assert "its sha256 is wrong" in caplog.text


def test_where_nothing_can_be_written_the_reference_still_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = pack(tmp_path, random_images(30), [30])
    (tmp_path / "reference").write_text("a file where the folder should be")
    assert reference(dataset, net(4), Workers()).count == 30
    assert len(caplog.records) == 1
    assert "reference statistics are not kept" in caplog.text


def test_a_cache_that_only_some_workers_can_read_is_used_by_none(
    on_workers: OnWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pack(tmp_path, random_images(30), [10, 10, 10])
    first = reference(dataset, net(4), Workers(), kernel_images=6)
    answers, exists = iter([True, False, True]), object_store.exists
    monkeypatch.setattr(object_store, "exists", lambda url: next(answers) and exists(url))
    for one in on_workers(3, lambda w: reference(dataset, net(4), w, kernel_images=6)):
        assert one.count == 30
        torch.testing.assert_close(one.moments[4].outer, first.moments[4].outer)


def knows(images: Images) -> Denoise:
    """A denoiser that makes x_0 of batch row i exactly images[i]."""
    x_0 = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return Parameterization.of("epsilon", SCHEDULE).output_from_x0(x_t, t, x_0)

    return denoise


def test_digits_are_recognised_and_noise_is_not(tmp_path: Path) -> None:
    digits = (load_digits().images[:300, :, :, None] * 255 / 16).astype(np.uint8)
    classifier = digits_net("cpu")
    truth = reference(pack(tmp_path, digits, [300]), classifier, Workers(), kernel_images=300)
    arguments: dict[str, Any] = {
        "image_shape": ImageShape(8, 8, 1),
        "num_images": 300,
        "batch_size": 300,
    }
    real = score(classifier, truth, denoise=knows(digits), **arguments).metrics
    noise = score(classifier, truth, denoise=lambda x_t, t: x_t * 0, **arguments).metrics
    assert real.keys() == {
        "eval/fd_digits",
        "eval/fd_digits_low",
        "eval/fd_digits_high",
        "eval/kd_digits",
        "eval/recognised",
        "eval/classes",
        "eval/is_digits",
        "eval/is_digits_deviation",
    }
    assert real["eval/recognised"] > 0.95
    assert real["eval/classes"] == 10
    assert abs(real["eval/fd_digits"]) < 1e-5
    assert noise["eval/recognised"] < 0.3
    assert noise["eval/fd_digits"] > 1
    assert noise["eval/kd_digits"] > real["eval/kd_digits"]


@pytest.mark.parametrize(
    "name, width, expected",
    [
        ("inception", 2048, ("eval/fid", "eval/kid")),
        ("inception", 768, ("eval/fid768", "eval/kid768")),
        ("inception", 192, ("eval/fid192", "eval/kid192")),
        ("inception", 2023, ("eval/sfid", "eval/kid_spatial")),
        ("digits", 64, ("eval/fd_digits", "eval/kd_digits")),
    ],
)
def test_fid_is_only_ever_the_standard_network(
    name: str, width: int, expected: tuple[str, str]
) -> None:
    assert metric_names(net(width, name=name), width)[:2] == expected


def test_the_provenance_names_all_that_the_score_depends_on(tmp_path: Path) -> None:
    feature_net = net(4, 8)
    truth = reference(
        pack(tmp_path, random_images(30), [30]), feature_net, Workers(), kernel_images=6
    )

    def provenance(**changes: Any) -> dict[str, Any]:
        found = score(feature_net, truth, **changes).provenance
        assert json.loads(json.dumps(found)) == found, "plain JSON"
        return found

    found = provenance()
    assert found["model"] == {"step": 7, "ema_decay_per_step": 0.99}
    assert found["samples"] | {"images": 40, "indices": [0, 39], "seed": 5} == found["samples"]
    assert found["samples"]["spacing"] == "uniform"
    assert found["features"]["widths"] == [4, 8]
    assert found["features"]["weights_sha256"] == "a" * 64
    assert found["reference"]["sha256"] == truth.sha256
    assert found["reference"]["images"] == 30
    assert found["versions"]["torch"] == torch.__version__

    def changed(**settings: Any) -> SamplingPlan:
        return SamplingPlan(PLAN.steps, replace(PLAN.settings, **settings))

    plans = {
        "seed": changed(seed=6),
        "eta": changed(eta=0.5),
        "clip": changed(clip=False),
        "sampler": changed(sampler="ancestral"),
        "variance": changed(sampler="ancestral", variance="fixed_large"),
        "spacing": replace(PLAN, steps=quadratic_steps(20, 3)),
        "steps": replace(PLAN, steps=uniform_steps(20, 4)),
    }
    for key, plan in plans.items():
        assert provenance(plan=plan)["samples"][key] != found["samples"][key]
    assert provenance(plan=replace(PLAN, steps=(20, 3, 0)))["samples"]["spacing"] == "custom"


def test_the_interval_of_ten_classes_in_turn_is_that_of_each_class_thinned(tmp_path: Path) -> None:
    """Images 0, 10, 20, ... are of one class; without class 0 the distance is of another model."""

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        labels = conditioning.labels
        assert labels is not None
        return 0.6 * x_t + (labels.view(-1, 1, 1, 1) - 4.5) / 3

    denoiser = Denoiser(
        network, Parameterization.of("epsilon", SCHEDULE), takes=ConditioningSpec(10)
    )
    images, feature_net = random_images(300), net(4)
    drawn = PIXELS.decode(draw(denoiser, PLAN, torch.arange(200), SHAPE, "cpu"))
    truth = reference(pack(tmp_path, images, [300]), feature_net, Workers())
    samples = SampleSet(denoiser, PLAN, SHAPE, num_images=200, batch_size=50, weights={})
    found = evaluate_samples(samples, feature_net, truth, Workers()).metrics
    known, seen = features_of(images, 4), features_of(drawn, 4)
    scores = [  # the classes' numbers are kept, whoever is left out of each: the i-th draw of each
        frechet_by_scipy(known, np.concatenate([np.delete(seen[c::10], i, 0) for c in range(10)]))
        for i in range(20)
    ]
    half = (found["eval/fid4_high"] - found["eval/fid4_low"]) / 2
    assert half < 4 * stats.t.ppf(0.975, 19) * (19 * np.var(scores)) ** 0.5
    lost = [frechet_by_scipy(known, seen[np.arange(200) % 10 != c]) for c in range(10)]
    assert half < 0.4 * stats.t.ppf(0.975, 9) * (9 * np.var(lost)) ** 0.5


def test_the_inception_score_is_of_a_network_that_knows_classes(tmp_path: Path) -> None:
    """Of an Inception without its last layer there is none, and the provenance says why."""
    truth = reference(pack(tmp_path, random_images(30), [30]), net(4), Workers())
    without = score(net(4), truth)
    assert not any(name.startswith("eval/is") for name in without.metrics)
    assert without.provenance["inception_score"].startswith("none: the weights' last layer")
    sure = replace(net(4), classify=lambda features: 1e3 * torch.eye(2)[torch.arange(40) % 2])
    found = score(sure, truth, batch_size=40)
    assert found.metrics["eval/is"] == pytest.approx(2)
    assert found.metrics["eval/is_deviation"] == pytest.approx(0)
    assert found.provenance["inception_score"] == "10 splits in order of index"
    assert "eval/recognised" not in found.metrics  # the classes are not the data's
    few = score(replace(net(4), classify=lambda features: torch.eye(9)), truth, num_images=9)
    assert "eval/is" not in few.metrics
    assert few.provenance["inception_score"].startswith("none: 9 images cannot fill 10 splits")


def test_samples_are_scored_against_their_prompts(on_workers: OnWorkers, tmp_path: Path) -> None:
    """The mean cosine of the samples that `draw` gives, on any number of workers."""
    truth = reference(pack(tmp_path, random_images(30), [30]), net(4), Workers())

    def aligned(workers: Workers) -> Scores:
        fits = Alignment(Angles(), PROMPTS)  # type: ignore[arg-type]
        return score(net(4), truth, workers, alignment=fits, batch_size=7)

    index = torch.arange(40)
    drawn = PIXELS.decode(draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, index, SHAPE, "cpu"))
    angles = drawn[:, 0, 0, 0] / 100
    cosines = np.cos(angles - np.resize(np.array(PROMPTS, float), 40))
    plain, found = score(net(4), truth), aligned(Workers())
    ends = stats.t.interval(0.95, 39, cosines.mean(), stats.sem(cosines))
    names = ("eval/alignment", "eval/alignment_low", "eval/alignment_high")
    expected = (cosines.mean(), *ends)
    assert [found.metrics[name] for name in names] == pytest.approx(expected, abs=1e-9)
    assert found.metrics.keys() == {*plain.metrics, *names}
    assert found.provenance["alignment"]["model_sha256"] == Angles.sha256
    assert "alignment" not in plain.provenance
    for one in on_workers(2, aligned):
        assert one.metrics == pytest.approx(found.metrics, rel=1e-11)
        assert one.provenance == found.provenance


def test_images_need_not_be_square(tmp_path: Path) -> None:
    """4 x 9 pixels: as many as the 6 x 6 of the other tests."""
    images, wide = random_images(90).reshape(90, 4, 9, 1), ImageShape(4, 9, 1)
    truth = reference(pack(tmp_path, images, [90]), net(8), Workers())
    drawn = PIXELS.decode(
        draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, torch.arange(40), wide, "cpu")
    )
    assert drawn.shape == (40, *wide)
    found = score(net(8), truth, image_shape=wide).metrics["eval/fid8"]
    expected = frechet_by_scipy(*(features_of(each, 8) for each in (images, drawn)))
    assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="draws 9x4x1 images and the reference data holds 4x9x1"):
        score(net(8), truth, image_shape=ImageShape(9, 4, 1))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_images": 1}, "num_images is 1; a covariance needs at least 2"),
        (
            {"image_shape": ImageShape(6, 6, 3)},
            "draws 6x6x3 images and the reference data holds 6x6x1",
        ),
        (
            {"denoise": lambda x_t, t: x_t * float("nan")},
            "16 of 16 images: values .* not finite",
        ),
    ],
)
def test_what_cannot_be_scored_says_why(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    truth = reference(pack(tmp_path, random_images(30), [30]), net(4), Workers())
    with pytest.raises(ValueError, match=reason):
        score(net(4), truth, **changes)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def broken(images: Tensor) -> dict[int, Tensor]:
        return {4: torch.full((len(images), 4), torch.inf)}

    with pytest.raises(ValueError, match="inception features of width 4 are not finite"):
        reference(
            pack(tmp_path, random_images(30), [30]), replace(net(4), extract=broken), Workers()
        )
    assert not (tmp_path / "reference").exists()


def test_a_single_reference_image_has_no_covariance(tmp_path: Path) -> None:
    truth = reference(pack(tmp_path, random_images(1), [1]), net(4), Workers())
    with pytest.raises(ValueError, match="reference data holds 1 image; at least 2"):
        score(net(4), truth)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of the FID network up to width 192, with weights of no meaning."""
    torch.manual_seed(0)
    path = tmp_path / "weights.npz"
    layers = Inception([192]).layers.state_dict()
    np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in layers.items()})
    return path


def test_inception_scores_carry_the_hash_and_the_resize_of_the_network(
    weights: Path, tmp_path: Path
) -> None:
    recipes: list[InceptionResize] = ["original", "pytorch-fid"]
    nets = [inception_net(weights, [192], resize, "cpu") for resize in recipes]
    dataset = pack(tmp_path / "data", random_images(3), [3])
    truths = [reference(dataset, one, Workers()) for one in nets]
    assert truths[0].sha256 != truths[1].sha256
    scores = score(nets[0], truths[0], num_images=2)
    assert scores.metrics.keys() == {"eval/fid192"}
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert scores.provenance["features"] == {
        "network": "inception",
        "widths": [192],
        "weights_sha256": sha256,
        "resize": "original",
    }


def test_scores_are_not_measured_with_another_network_than_the_reference(tmp_path: Path) -> None:
    truth = reference(pack(tmp_path, random_images(30), [30]), net(4), Workers())
    with pytest.raises(ValueError, match="reference was made with features"):
        score(net(4, sha256="b" * 64), truth)


def test_more_samples_are_extrapolated_to_and_others_compared_with(tmp_path: Path) -> None:
    """The parts in their own modules have their truths; here, that each gets what it should."""
    images, feature_net = random_images(90), net(8)
    truth = reference(pack(tmp_path / "a", images, [90]), feature_net, Workers(), kernel_images=60)
    others = reference(pack(tmp_path / "b", images[:50], [50]), feature_net, Workers())
    found = score(
        feature_net,
        truth,
        num_images=60,
        optional_metrics=OptionalMetrics(True, True),
        held_out=others,
    )
    drawn = PIXELS.decode(
        draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, torch.arange(60), SHAPE, "cpu")
    )
    data, samples = features_of(images, 8), features_of(drawn, 8)
    metrics = found.metrics
    assert metrics["eval/fid8_held_out"] == pytest.approx(
        frechet_by_scipy(data[:50], samples), rel=1e-6
    )
    kept = torch.from_numpy(data[np.arange(60) * 90 // 60]), torch.from_numpy(samples)
    shares = metrics["eval/precision8"], metrics["eval/recall8"]
    assert shares == pytest.approx(precision_recall(*kept))
    group = np.arange(60) % 10
    without = stats.describe([frechet_by_scipy(data, samples[group != g]) for g in range(10)])
    value = 10 * frechet_by_scipy(data, samples) - 9 * without.mean  # Quenouille 1956
    assert metrics["eval/fid8_infinity"] == pytest.approx(value, rel=1e-4)
    error = 9 * (without.variance / 10) ** 0.5  # of the mean of ten pseudo-values (Tukey 1958)
    assert metrics["eval/fid8_infinity_error"] == pytest.approx(error, rel=1e-2)
    assert found.provenance["held_out"]["images"] == 50
    assert found.provenance["infinity"] == {
        "8": "bias correction and standard error of the jackknife over 10 groups of samples"
    }


def test_too_few_samples_are_not_extrapolated_and_the_provenance_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 60 samples and 16 features what is left of the bias is more than the error told."""
    feature_net = net(8, 16)
    truth = reference(pack(tmp_path, random_images(90), [90]), feature_net, Workers())
    found = score(
        feature_net, truth, num_images=60, optional_metrics=OptionalMetrics(extrapolate=True)
    )
    assert "eval/fid8_infinity" in found.metrics
    assert "eval/fid16_infinity" not in found.metrics
    assert "eval/fid16_infinity_error" not in found.metrics
    reason = "none: 60 images are too few for 16 features; draw 64"
    assert found.provenance["infinity"]["16"] == reason
    assert reason in caplog.text
    assert "infinity" not in score(feature_net, truth, num_images=60).provenance


def test_spatial_features_are_scored_by_their_distance_alone(tmp_path: Path) -> None:
    """scipy's distance of the 2023 numbers; theirs are no features for a kernel or neighbours."""
    base = net(8)
    spread = np.random.default_rng(3).normal(size=(8, 2023))

    def extract(images: Tensor) -> dict[int, Tensor]:
        return {2023: (base.extract(images)[8].double() @ torch.from_numpy(spread)).float()}

    feature_net, images = replace(base, widths=(2023,), extract=extract), random_images(60)
    truth = reference(pack(tmp_path, images, [60]), feature_net, Workers(), kernel_images=40)
    found = score(
        feature_net, truth, num_images=10, optional_metrics=OptionalMetrics(precision_recall=True)
    ).metrics
    assert found.keys() == {"eval/sfid"}  # 10 samples are too few for an interval
    drawn = PIXELS.decode(
        draw(Denoiser.of_noise(blind, SCHEDULE), PLAN, torch.arange(10), SHAPE, "cpu")
    )
    # An isometry of what `spread` spans: the same distance in 8 numbers, where scipy's root is good
    root = sqrtm(spread @ spread.T).real
    expected = frechet_by_scipy(features_of(images, 8) @ root, features_of(drawn, 8) @ root)
    assert found["eval/sfid"] == pytest.approx(expected, rel=1e-5)
