"""Parameters of the base model that an adapter trains in place: biases, norms."""

import torch
from torch import nn


class TrainedParameters:
    """Parameters of the base model that one adapter trains. The model holds either their trained values or the base's own;
    the others are kept aside. Several adapters may train one parameter as long as not two of them are in the model at once, and
    each is made while none is.

    parameters: by path; one that is registered under several paths comes once per path
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self._distinct = list({id(parameter): parameter for parameter in parameters.values()}.values())
        self._aside = [parameter.detach().clone() for parameter in self._distinct]
        self.in_model = False

    def put(self, trained: bool) -> None:
        """Let the model hold the trained values, or the base's."""
        if trained is self.in_model:
            return
        for i, parameter in enumerate(self._distinct):
            self._aside[i], parameter.data = parameter.data, self._aside[i].to(parameter)
        self.in_model = trained

    def trained(self) -> dict[str, torch.Tensor]:
        """The trained values by path, wherever they are."""
        values = self._distinct if self.in_model else self._aside
        by_id = {id(parameter): value for parameter, value in zip(self._distinct, values, strict=True)}
        return {path: by_id[id(parameter)] for path, parameter in self.parameters.items()}

    def shares_with(self, other: "TrainedParameters") -> bool:
        """True if both train the same parameter."""
        return not {id(parameter) for parameter in self._distinct}.isdisjoint(map(id, other._distinct))

    def requires_grad_(self, flag: bool) -> None:
        for parameter in self._distinct:
            parameter.requires_grad_(flag)
