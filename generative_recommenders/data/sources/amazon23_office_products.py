"""Amazon reviews of 2023, Office Products: events with the published splits, see `amazon_2023`."""

from generative_recommenders.data.sources.amazon_2023 import source

SOURCE = source("amazon23-office-products", "Office_Products", in_train=65_873, through_valid=70_173)
