"""Diffusion mathematics: schedules, objectives and samplers, free of networks, files and devices."""
