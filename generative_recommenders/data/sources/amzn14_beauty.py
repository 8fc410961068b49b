"""Amazon 2014, Beauty: 5-core reviews as sequences. What is read and how: `amazon_reviews`."""

from generative_recommenders.data.sources import amazon_reviews

SOURCE = amazon_reviews.source("amzn14-beauty", "Beauty", users=22_363, items=12_101, events=198_502)
