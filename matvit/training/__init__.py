"""Training of elastic encoders: `matvit train RECIPE.yaml`."""
