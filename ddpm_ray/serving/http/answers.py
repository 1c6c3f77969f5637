"""Answers in the form of OpenAI's image API, and those of jobs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.job_entry import JobReport
from ddpm_ray.serving.orders import (
    Accepted,
    Event,
    Failed,
    Finished,
    JobProgress,
    Kind,
    PreviewFiles,
)

EVENT_NAMES: dict[Kind, str] = {
    "generation": "image_generation",
    "edit": "image_edit",
    "variation": "image_variation",
}


@dataclass
class Answer:
    """The answer to a client about one job, from its events."""

    kind: Kind
    request: ImageRequest
    secret: str  # in the URLs of its images
    base: str  # URL of the server
    is_job: bool = False  # its stream has progress, which OpenAI's clients do not expect
    accepted: Accepted | None = None
    finished: Finished | None = None

    def note(self, event: Event) -> None:
        """Take an event of the job."""
        match event:
            case Accepted():
                self.accepted = event
            case Finished():
                self.finished = event

    def images(self) -> dict[str, Any]:
        """The JSON of all images."""
        assert self.finished is not None
        data = [self._image(index) for index in range(len(self.finished.files))]
        return {"created": int(time.time()), "data": data, **self._form()}

    def stream_events(self, event: Event) -> Iterator[str]:
        """Server-sent events for an event of the job."""
        name = EVENT_NAMES[self.kind]
        match event:
            case PreviewFiles(number, files):
                for index, file in enumerate(files):
                    yield sse(
                        f"{name}.partial_image",
                        {
                            "b64_json": base64.b64encode(file).decode(),
                            "partial_image_index": number,
                            "index": index,
                            "created_at": int(time.time()),
                            **self._form(),
                            "output_format": "png",
                        },
                    )
            case Finished(files):
                for index in range(len(files)):
                    fields = {**self._image(index), "created_at": int(time.time()), **self._form()}
                    yield sse(f"{name}.completed", {"index": index, **fields})
            case Failed(error):
                yield sse("error", error.body())
            case JobProgress() if self.is_job:
                yield sse("progress", progress_fields(event))

    def _image(self, index: int) -> dict[str, Any]:
        assert self.finished is not None
        facts = dict(self.accepted.facts) if self.accepted else {}
        found: dict[str, Any] = {"ddpm_ray": facts | {"index": index}}
        if self.request.response_format == "url":
            suffix = self.request.output_format
            return found | {"url": f"{self.base}v1/files/{self.secret}/{index}.{suffix}"}
        return found | {"b64_json": base64.b64encode(self.finished.files[index]).decode()}

    def _form(self) -> dict[str, str]:
        return {
            "output_format": self.request.output_format,
            "quality": "auto",
            "background": "auto",
            "size": self.request.size,
        }


def progress_fields(progress: JobProgress) -> dict[str, Any]:
    """The JSON of a job's progress."""
    left = progress.seconds_left
    return {
        "place": progress.place,
        "seconds_left": None if left is None else round(left, 1),
        "computed_rows": progress.computed,
        "rows": progress.rows or None,
        "lost_processes": progress.losses,
    }


def job_fields(job_id: str, report: JobReport, answer: Answer) -> dict[str, Any]:
    """The JSON of a job."""
    fields = {"id": job_id, "object": "job", "status": report.state, "kind": answer.kind}
    fields |= progress_fields(report.progress)
    if answer.finished is not None:
        fields |= answer.images()
    for event in report.events:
        if isinstance(event, Failed):
            fields |= event.error.body()
    return fields


def sse(name: str, fields: dict[str, Any]) -> str:
    """A server-sent event, whose JSON has its name as `type`."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n"
