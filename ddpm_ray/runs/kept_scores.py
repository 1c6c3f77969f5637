"""The scores of a step, as a run keeps and reports them."""

from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.evaluation.sample_quality import Scores
from ddpm_ray.evaluation.score_table import scores_alone
from ddpm_ray.reporting import Row, Sink
from ddpm_ray.training.state import TrainingState


def keep_scores(
    scores: Scores, step: int, wanted: EvaluationConfig, state: TrainingState, sink: Sink | None
) -> None:
    """Store the scores of `step` in the state and pass them to the sink."""
    state.scores = {"step": step, **scores.to_json()}
    if sink is not None:
        # Of a single score, the interval's ends are a tag (runs/train.py), not two charts.
        logged = scores.metrics if wanted.every_steps else scores_alone(scores.metrics)
        sink.rows([Row(step, logged)])
        sink.document(f"evaluation/step-{step:08d}.json", state.scores)
