"""Scores summaries of the pocket world's talks. `evaluate.load` opens it from this folder, without a network."""
import datasets
import evaluate
import numpy as np

from cai_course.evaluation import rouge_l, talk_scores
from cai_course.stats import estimate

DESCRIPTION = """Three measures of a summary of a talk: `rude` (share of summaries with a rude word), `faithful` (mean share
of the talk's five facts that the summary gets right, by the oracle of the pocket world) and `rouge_l` (mean ROUGE-L F
measure against a written summary). Each comes with its 95% interval over prompts."""

INPUTS = """Args:
    predictions: summaries to score, texts.
    prompts: what the model was asked, as `cai_course.world.dialogues` words it, one for each summary.
    references: written summaries, one for each.
Returns:
    `rude`, `faithful`, `rouge_l` in [0, 1]; `rude_interval` and so on, [low, high]; `n`, the number of prompts."""


class TalkSummaries(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "prompts": text, "references": text}))

    def _compute(self, predictions, prompts, references):
        scores = {**talk_scores(prompts, predictions), "rouge_l": rouge_l(predictions, references)}
        out = {}
        for name, values in scores.items():
            found = estimate(np.array(values), clusters=prompts)
            out[name], out[f"{name}_interval"] = found.value, [found.low, found.high]
        return {**out, "n": found.n}
