"""Amazon reviews of 2023, Video Games: events with the published splits, see `amazon_2023`."""

from generative_recommenders.data.sources.amazon_2023 import source

SOURCE = source("amazon23-video-games", "Video_Games", in_train=22_976, through_valid=24_070)
