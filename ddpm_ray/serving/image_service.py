"""Images of orders: a job of an engine for each, with previews, files and what they were made by.

No HTTP and no Ray here. Orders of one model share the batches of its engine.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field

from ddpm_ray.serving.image_jobs import ImageJob, Preview, Previewer
from ddpm_ray.serving.job_plans import RequestLimits
from ddpm_ray.serving.limits import OverloadedError, QueueLimit
from ddpm_ray.serving.order_plans import planned
from ddpm_ray.serving.orders import Accepted, ImageOrder
from ddpm_ray.serving.request_errors import RequestError, overloaded
from ddpm_ray.serving.served_models import ServedModels

WEIGHTS = ("step", "weights_sha256", "prior_sha256", "upsamplers_sha256")  # of the provenance
DEFAULT_ALLOWANCE_S = 10.0  # of a job while the rate is not known


class UnaffordableError(Exception):
    """A job costs more than the client may spend; the argument is its cost, in megapixels."""


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of the service."""

    max_queued_s: float = 60.0  # of accepted work, at the measured rate
    max_job_s: float = 600.0  # of one job, at that rate
    requests: RequestLimits = field(default_factory=RequestLimits)


class ImageService:
    """Draws the images of orders with the served models."""

    def __init__(self, models: ServedModels, settings: ServiceSettings | None = None) -> None:
        self.models, self.settings = models, settings or ServiceSettings()

    def start(
        self, order: ImageOrder, source: str = "", affordable: float = float("inf")
    ) -> tuple[ImageJob, Accepted]:
        """Begin a job, with the model of its name, or with that at `source`.

        A job with a source was accepted before, by a process that was lost: there is room for it in
        any case. Raises RequestError (429 where there is no room), and UnaffordableError.
        """
        request = order.request
        served = self.models.of_name(request.model, source)
        model, engine = served.model, served.engine
        job_plan = planned(order, served.name, model, self.settings.requests)
        cost = job_plan.cost(model)
        if cost.megapixels > affordable * (1 + 1e-6):
            raise UnaffordableError(cost.megapixels)
        _, rate = engine.load
        if not source:
            self._require_short(cost.rows, rate)
            try:
                QueueLimit(self.settings.max_queued_s, lambda: engine.load).require_room(cost.rows)
            except OverloadedError as error:
                raise overloaded(error) from error
        made: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
        show = Previewer(model, request.partial_images, job_plan.shown_steps, made)
        job = engine.submit(
            lambda: job_plan.act(model, show),
            images=job_plan.images,
            cost=cost.rows,
            allowance_s=cost.rows / rate if rate else DEFAULT_ALLOWANCE_S,
        )
        facts = {"model": served.name, "kind": order.kind, **job_plan.facts}
        facts |= {key: model.provenance[key] for key in WEIGHTS if key in model.provenance}
        image_job = ImageJob(job, cost.rows, facts, made)
        accepted = Accepted(served.source, facts, cost.megapixels, image_job.progress())
        return image_job, accepted

    def _require_short(self, rows: int, rate: float) -> None:
        """Raise RequestError for a job that takes longer than max_job_s."""
        limit_s = self.settings.max_job_s
        if rate and rows / rate > limit_s:
            raise RequestError(
                f"this takes about {rows / rate:.1f} s of network calls, and a request has at most "
                f"{limit_s:g} s (limits.max_job_s): take fewer steps or images, or less canvas",
                "steps",
            )
