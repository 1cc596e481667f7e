"""Table 1's accuracies: the command that measures them where their data can be had."""

from __future__ import annotations

from titans.experiments.reproduce.claims import Claim, paper
from titans.experiments.reproduce.table import PaperTable, title
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Progress, Request

COMMAND = """```sh
python -m titans.evaluate.lm_eval --model titans --model_args pretrained=FOLDER \\
    --tasks lambada_openai,piqa,hellaswag,winogrande,arc_easy,arc_challenge,social_iqa,boolq,wikitext
```"""


class Commonsense(PaperTable):
    """No cell: the data of the tasks are in no package."""

    name = "paper-commonsense"
    title = "Commonsense reasoning: the accuracies of table 1"
    heading = "The accuracies of the paper's table 1"
    systems, columns = (), ()

    def cells(self, request: Request) -> list[Cell]:
        return []

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        raise ValueError("there is nothing to measure: the page has the command of lm-eval")

    def about(self, results: Results) -> str:
        return (
            f"{self.heading}. With a network, lm-eval measures any folder of `titans train`:\n\n{COMMAND}\n\n"
            "Models of a few million parameters answer these tasks by chance, whatever they are made of."
        )

    def claims(self) -> list[Claim]:
        rows = paper("language")["rows"]["760M"]
        return [
            Claim(
                f"{title(row)}: average accuracy of {figures[2]}",
                f"{paper('language')['source']}, 760M",
                unavailable="the data of the tasks are in no package, and small models answer by chance",
            )
            for row, figures in rows.items()
        ]
