"""Fast weights that recall which word followed a context, from a language model's states and words."""

from titans.nn.association.layer import LEAST_SHARE, Association, AssociationRead
from titans.nn.association.state import AssociationState

__all__ = ["LEAST_SHARE", "Association", "AssociationRead", "AssociationState"]
