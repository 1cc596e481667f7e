"""Fast weights that recall which token followed a context, from a language model's states."""

from titans.nn.association.layer import Association, AssociationRead
from titans.nn.association.state import AssociationState

__all__ = ["Association", "AssociationRead", "AssociationState"]
