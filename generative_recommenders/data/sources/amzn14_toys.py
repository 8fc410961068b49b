"""Amazon 2014, Toys and Games: 5-core reviews as sequences. What is read and how: `amazon_reviews`."""

from generative_recommenders.data.sources import amazon_reviews

SOURCE = amazon_reviews.source("amzn14-toys", "Toys_and_Games", users=19_412, items=11_924, events=167_597)
