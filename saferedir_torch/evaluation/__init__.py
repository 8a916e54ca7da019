"""What is measured and with what certainty: measures, the networks they read pictures with, intervals."""
