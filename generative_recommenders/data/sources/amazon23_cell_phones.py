"""Amazon reviews of 2023, Cell Phones and Accessories: events with the published splits, see `amazon_2023`."""

from generative_recommenders.data.sources.amazon_2023 import source

SOURCE = source("amazon23-cell-phones", "Cell_Phones_and_Accessories", in_train=94_609, through_valid=103_084)
