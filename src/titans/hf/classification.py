"""Classes of whole sequences with a Titans model: `TitansForSequenceClassification`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from titans.hf.configuration import TitansConfig
from titans.hf.layer import TitansPreTrainedModel
from titans.hf.modeling import TitansModel


class TitansForSequenceClassification(TitansPreTrainedModel):
    """A Titans model with a linear classifier on the mean of the states of all real tokens.

    The classes are `config.num_labels`, a field of the library.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits of the classes.

        Args:
            input_ids: (batch, time) int64. attention_mask: (batch, time); 0 marks padding, anywhere.
            labels: (batch,) int64, the classes; then the loss is their mean cross-entropy.

        Raises:
            ValueError: for labels of another shape or outside the classes, or a row without a real token.
        """
        batch, classes = input_ids.shape[0], self.score.out_features
        if labels is not None and (
            labels.shape != (batch,) or (batch and not 0 <= int(labels.min()) <= int(labels.max()) < classes)
        ):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: give ({batch},) with classes from 0 to "
                f"{classes - 1}"
            )
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        if attention_mask is None:
            mean = states.mean(1)
        else:
            real = attention_mask.to(states.dtype)[..., None]
            if not bool((count := real.sum(1)).all()):
                raise ValueError("attention_mask has a row of zeros: give every row a real token")
            mean = (states * real).sum(1) / count
        logits = self.score(mean)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoModelForSequenceClassification.register(TitansConfig, TitansForSequenceClassification)
