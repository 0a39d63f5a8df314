"""What was trained, acting: agent, rollout, video."""
