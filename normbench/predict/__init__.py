"""From a session's weights and images to predictions and, where labels are known, how good they are."""
