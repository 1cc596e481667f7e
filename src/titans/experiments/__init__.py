"""Recipes: train these, evaluate those, print what came out, whatever it is."""
