"""How a stream is watched, as command line and fleet file say it."""

from pydantic import Field

from apt_ray.config import Settings


class WatchSettings(Settings):
    """How a stream is watched."""

    event_frames: int = Field(
        default=2,
        ge=1,
        description="Frames in a row above the threshold that are an event; all frames of a part"
        " that is seen in fewer.",
    )
    end_frames: int = Field(
        default=2,
        ge=1,
        description="Frames in a row well below the threshold with which an event is over.",
    )
    gate: bool = Field(
        default=True,
        description="A frame that differs from the last inspected one by no more than the camera's"
        " noise takes its score.",
    )
    frozen_frames: int = Field(
        default=10,
        ge=0,
        description="So many frames in a row that were there before, to the last bit, are a frozen"
        " camera; 0 looks for none.",
    )
    jumps: bool = Field(default=True, description="Whether missing frames are looked for.")
