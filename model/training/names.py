"""Names of people and of pets."""

from model.training.wordings import word_list

NAMES = word_list(
    """
    Ada, Aaron, Abigail, Adam, Adele, Adrian, Agnes, Ahmed, Aisha, Alan, Albert, Alejandro,
    Alex, Alice, Alina, Amara, Amelia, Amir, Amy, Ana, Anders, Andrea, Andrew, Angela, Anika,
    Anna, Anton, Antonia, Aria, Arjun, Arthur, Astrid, Aurora, Ava, Axel, Barbara, Barnaby,
    Beatrice, Ben, Benjamin, Bernard, Beth, Bianca, Bob, Boris, Brenda, Brian, Bridget, Bruce,
    Caleb, Camille, Carl, Carla, Carlos, Carmen, Caroline, Casper, Cecilia, Charles, Charlotte,
    Chen, Chiara, Chloe, Chris, Clara, Claudia, Colin, Connor, Cora, Cyril, Dagmar, Daniel,
    Daphne, Daria, David, Deborah, Declan, Delia, Dennis, Diana, Diego, Dmitri, Dominic, Dora,
    Duncan, Dylan, Edgar, Edith, Eduardo, Edward, Eleanor, Elena, Elias, Elijah, Elise, Ella,
    Elliot, Elsa, Emil, Emilia, Emily, Emma, Enzo, Eric, Erin, Ernest, Esther, Ethan, Eugene,
    Eva, Evelyn, Fabian, Farid, Fatima, Felicity, Felix, Fernando, Fiona, Florence, Frances,
    Frank, Freya, Gabriel, Gareth, George, Gerald, Gina, Giovanni, Gloria, Gordon, Grace,
    Graham, Greg, Greta, Gustav, Hannah, Hans, Harold, Harriet, Harry, Hassan, Hazel, Heidi,
    Helen, Henrik, Henry, Hiroshi, Holly, Hugo, Ian, Ibrahim, Ida, Igor, Ilse, Imogen, Ines,
    Ingrid, Irene, Iris, Isaac, Isabel, Isla, Ivan, Ivy, Jack, Jacob, Jade, James, Jan, Jane,
    Janet, Jasmine, Jason, Javier, Jennifer, Jeremy, Jesse, Jim, Joan, Joe, Johan, John, Jonas,
    Jonathan, Jorge, Joseph, Judith, Julia, Julian, Juliet, Jun, Kai, Karen, Karim, Karl, Kate,
    Katya, Keiko, Keith, Kenji, Kevin, Kim, Kira, Klaus, Konstantin, Kurt, Kyle, Lara, Lars,
    Laura, Lauren, Lea, Leah, Leila, Lena, Leo, Leonard, Leonora, Lewis, Liam, Lily, Linda,
    Linus, Lionel, Lisa, Liu, Liz, Logan, Lola, Lorenzo, Louis, Louise, Lucas, Lucia, Lucy,
    Luis, Luke, Luna, Lydia, Mabel, Madeleine, Magda, Magnus, Malik, Marco, Margaret, Maria,
    Marie, Marina, Mario, Mark, Marta, Martin, Mary, Mateo, Matilda, Matthew, Maud, Max, Maya,
    Megan, Mei, Melissa, Mia, Michael, Miguel, Mila, Miles, Milo, Mina, Miriam, Mohammed, Mona,
    Monica, Morgan, Muriel, Nadia, Nancy, Naomi, Natalie, Natasha, Nathan, Ned, Neil, Nia,
    Nicholas, Nicole, Nigel, Nikolai, Nina, Noah, Noel, Nora, Norman, Octavia, Olaf, Olga,
    Oliver, Olivia, Omar, Oscar, Otto, Ottilie, Owen, Pablo, Patricia, Patrick, Paul, Paula,
    Pavel, Pedro, Penelope, Percy, Peter, Petra, Phil, Philippa, Phoebe, Pierre, Priya, Quentin,
    Quinn, Rachel, Rafael, Ralph, Ramona, Raymond, Rebecca, Reggie, Renata, Rhys, Ricardo,
    Richard, Rita, Robert, Robin, Roger, Roland, Rosa, Rose, Rosemary, Roxanne, Ruby, Rupert,
    Ruth, Ryan, Sabine, Sadie, Sally, Sam, Samantha, Samuel, Sandra, Sanjay, Sara, Sarah, Sasha,
    Saul, Scott, Sean, Sebastian, Selma, Serena, Sergei, Seth, Shirley, Sigrid, Silvia, Simon,
    Sofia, Solveig, Sonia, Sophie, Stanley, Stefan, Stella, Stephen, Steve, Stuart, Susan, Sven,
    Sylvia, Tamara, Tanya, Tara, Tariq, Ted, Teresa, Theodore, Theresa, Thomas, Tim, Tobias,
    Todd, Tom, Tony, Tracy, Tristan, Ulrich, Una, Ursula, Valentina, Vanessa, Vera, Victor,
    Victoria, Vikram, Vincent, Viola, Violet, Vivian, Vladimir, Walter, Wanda, Wei, Wendy,
    Wilhelm, William, Winifred, Xavier, Yasmin, Yolanda, Yuki, Yusuf, Yvonne, Zachary, Zara,
    Zelda, Zoe, José, Zoë, René, Jürgen, Søren, Łukasz, Иван, Юлия, Мария, Олег
    """
)

SURNAMES = word_list(
    """
    Adler, Baker, Becker, Bell, Brown, Carter, Clark, Cooper, Costa, Davies, Evans, Fischer,
    Foster, Garcia, Gray, Hansen, Hill, Hughes, Ivanov, Jensen, Johnson, Jones, Keller, Khan,
    King, Lee, Lindgren, Lopez, Lovelace, Martin, Meyer, Miller, Moore, Moreau, Murphy,
    Nakamura, Nguyen, Novak, Okafor, Parker, Patel, Pereira, Quinn, Rossi, Santos, Schmidt,
    Silva, Smith, Stone, Tanaka, Taylor, Turner, Walker, Watson, White, Wilson, Wright, Young
    """
)

PET_NAMES = word_list(
    """
    Rex, Apollo, Archie, Bagel, Bailey, Bandit, Barney, Basil, Bear, Bella, Benji, Biscuit,
    Blackie, Boots, Bruno, Bubbles, Buddy, Buster, Button, Caramel, Casper, Charlie, Chester,
    Chewie, Chip, Cinnamon, Cleo, Clover, Coco, Cookie, Copper, Cosmo, Daisy, Dexter, Diesel,
    Domino, Dusty, Echo, Fang, Felix, Fido, Finn, Flash, Fluffy, Frodo, Garfield, Gizmo, Goldie,
    Gulliver, Gus, Hamlet, Hazel, Honey, Hunter, Jasper, Jelly, Kiki, Kitty, Kiwi, Lady, Lucky,
    Lulu, Maggie, Mango, Marble, Maximus, Merlin, Mickey, Midnight, Milo, Minnie, Misty, Mocha,
    Molly, Moose, Muffin, Murphy, Nala, Nemo, Nugget, Nutmeg, Oreo, Pancake, Patch, Peaches,
    Peanut, Pebbles, Penny, Pepper, Pickle, Pippin, Pixel, Pluto, Poppy, Pudding, Pumpkin,
    Radar, Ranger, Rascal, Rocky, Rosie, Rufus, Rusty, Salem, Scooter, Scout, Shadow, Simba,
    Smokey, Sneakers, Snickers, Snoopy, Socks, Sparky, Spot, Sprout, Stitch, Sunny, Taco,
    Tarzan, Teddy, Thor, Tigger, Tinker, Toby, Toffee, Trixie, Truffle, Tucker, Tux, Twix,
    Velvet, Waffles, Whiskers, Willow, Winston, Wookie, Yoda, Ziggy, Zorro, Mrs Tibbles, Mister
    Fox, Captain Fluff, Sir Barks, Lady Paws
    """
)
