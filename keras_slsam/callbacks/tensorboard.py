"""Writes what an `ArmLogger` records for TensorBoard, on any backend."""

import io
import time

import numpy as np

from keras_slsam.analysis import checks
from keras_slsam.analysis import plots

_INSTALL = (
    "`log_dir` needs TensorBoard and Matplotlib: `pip install keras-slsam[analysis]`."
)


class Writer:
    """Writes scalars for each arm, and a heat map of the records so far.

    Args:
        log_dir: String or path, the folder.
    """

    def __init__(self, log_dir):
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.compat.proto import summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise ImportError(_INSTALL) from error
        checks.need("matplotlib.figure")
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = event_file_writer.EventFileWriter(str(log_dir))

    def write(self, logger):
        """Writes the last record of a logger.

        Args:
            logger: `ArmLogger`.
        """
        record = logger.records[-1]
        values = [
            self._summary.Value(tag=f"{quantity}/{name}", simple_value=number)
            for quantity, numbers in record.items()
            if isinstance(numbers, np.ndarray)
            for name, number in zip(logger.names, numbers)
        ]
        values.append(self._summary.Value(tag="arms", image=self._heat_map(logger)))
        self._file.add_event(
            self._event(
                wall_time=time.time(),
                step=record["step"],
                summary=self._summary(value=values),
            )
        )

    def flush(self):
        """Makes sure that everything is in the file."""
        self._file.flush()

    def _heat_map(self, logger):
        figure = plots.arm_choice(logger).figure
        width, height = map(int, figure.get_size_inches() * figure.dpi)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        return self._summary.Image(
            height=height,
            width=width,
            colorspace=4,  # RGBA
            encoded_image_string=png.getvalue(),
        )
