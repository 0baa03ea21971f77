"""The CPU path: loops only. Who visits which element, and how partial results merge."""
