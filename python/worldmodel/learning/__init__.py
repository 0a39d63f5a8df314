"""How a world model learns: learner, objectives, trainer, presets."""
