"""Research: questions that are answered by training and reading, and the recipes that they use.

`python -m titans.experiments NAME` measures what is missing of an experiment and draws its table. The recipe
of the models in the zoo and the demo are commands of their own (`titans.experiments.recipe`, `.demo`).
"""
