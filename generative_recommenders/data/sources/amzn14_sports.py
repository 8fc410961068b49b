"""Amazon 2014, Sports and Outdoors: 5-core reviews as sequences. What is read and how: `amazon_reviews`."""

from generative_recommenders.data.sources import amazon_reviews

SOURCE = amazon_reviews.source("amzn14-sports", "Sports_and_Outdoors", users=35_598, items=18_357, events=296_337)
