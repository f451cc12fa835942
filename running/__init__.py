"""What every run needs: flags, devices, the model directory, schedules, one training step, the loop, the order of a run."""
