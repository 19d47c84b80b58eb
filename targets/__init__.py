"""What a machine can do: instruction sets, legal formats, toolchains, cost models, tuned databases."""
