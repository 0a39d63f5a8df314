"""Acting: agent, rollout, video."""
