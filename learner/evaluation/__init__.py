"""What is measured on any world model, through the contracts of `learner.interfaces` alone."""
