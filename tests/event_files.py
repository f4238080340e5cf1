"""TensorBoard's own reader of event files, without the TensorFlow that it would otherwise bring in."""

import sys
import types


def read_events(folder):
    """Everything that the event files of a folder hold, as TensorBoard shows it."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
