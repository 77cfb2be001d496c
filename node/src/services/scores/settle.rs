//! Settles epochs whose pages are open: fetches what other validators ruled, draws their audits again, and counts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message as _;
use sundara_proto::batch::Batch;
use sundara_proto::crypto::Network;
use sundara_proto::id::Hotkey;
use sundara_proto::pb;
use sundara_proto::rules::merkle;
use sundara_proto::units::EpochLength;
use sundara_proto::verdict::Verdict;
use sundara_proto::wire::WireMessage as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::super::directory::Directory;
use super::super::pages::{self, OPEN_AFTER_EPOCHS};
use super::books::{OwnBooks, committed, roots_of, verdicts};
use super::{Draws, EpochScores, LOOK_EVERY, SETTLE_FOR, SETTLED, ScoresConfig, ValidatorPages, miners};
use crate::domain::audit::{EpochSecret, FLOOR, recheck};
use crate::domain::score::Tally;
use crate::net::NetHandle;
use crate::service::wall_now;
use crate::store::{KeyRange, Keyspace, SharedStore, StoreError, WriteBatch};

/// A page is waited for so long: half a megabyte from a slow peer.
const PAGE_WITHIN: Duration = Duration::from_secs(10);
/// Batches read from the store in one go.
const SCAN: usize = 256;
/// Records deleted in one step of retention.
const RETAIN_STEP: usize = 64;

pub(super) struct Settler {
    pub(super) config: ScoresConfig,
    pub(super) network: Network,
    pub(super) epoch_length: EpochLength,
    pub(super) net: NetHandle,
    pub(super) directory: Directory,
    pub(super) store: SharedStore,
    pub(super) own: Arc<Mutex<OwnBooks>>,
    pub(super) settled_tx: watch::Sender<Option<u64>>,
}

/// An epoch on its way to being settled.
#[derive(Default)]
struct Account {
    tally: Tally,
    validators: BTreeMap<Hotkey, ValidatorPages>,
    /// Pages of others that this node holds only for this.
    fetched: Vec<Vec<u8>>,
    incomplete: bool,
    anything: bool,
}

/// Why a page does not count.
enum NoPage {
    /// Its author could not be asked, or would not answer.
    Away,
    /// It is not what the root says.
    Bad,
}

impl Settler {
    pub(super) async fn run(self, token: CancellationToken) {
        let every = LOOK_EVERY.min(self.epoch_length.duration() / 4);
        loop {
            let looked = tokio::select! {
                () = token.cancelled() => return,
                looked = self.look() => looked,
            };
            if let Err(e) = looked {
                tracing::error!(error = %e, "epochs cannot be settled");
            }
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
        }
    }

    async fn look(&self) -> Result<(), StoreError> {
        while self.own.lock().unwrap_or_else(PoisonError::into_inner).catch_up(self.store.as_ref())? {
            tokio::task::yield_now().await;
        }
        let now = self.epoch_length.epoch(wall_now());
        for epoch in now.saturating_sub(OPEN_AFTER_EPOCHS + SETTLE_FOR)..=now.saturating_sub(OPEN_AFTER_EPOCHS) {
            let known = SETTLED.get(self.store.as_ref(), &epoch.to_be_bytes())?;
            if !known.as_ref().is_some_and(|known| known.complete) {
                self.settle(epoch, known).await?;
            }
            self.settled_tx.send_if_modified(|last| {
                let news = last.is_none_or(|last| last < epoch)
                    && SETTLED
                        .get(self.store.as_ref(), &epoch.to_be_bytes())
                        .is_ok_and(|s| s.is_some_and(|s| s.complete));
                if news {
                    *last = Some(epoch);
                }
                news
            });
        }
        Ok(())
    }

    async fn settle(&self, epoch: u64, known: Option<EpochScores>) -> Result<(), StoreError> {
        let mut account = Account::default();
        self.own_pages(epoch, &mut account).await?;
        self.others(epoch, &mut account).await?;
        if !account.anything {
            return Ok(());
        }
        let settled = EpochScores {
            epoch,
            settled: true,
            complete: !account.incomplete,
            jobs: account.tally.jobs() as u64,
            miners: miners(&account.tally.sums()),
            validators: account.validators.into_values().collect(),
        };
        if known.as_ref() == Some(&settled) {
            return Ok(());
        }
        let mut write = WriteBatch::new();
        SETTLED.put(&mut write, epoch.to_be_bytes().to_vec(), &settled);
        if settled.complete {
            for key in account.fetched {
                write.delete(Keyspace::Pages, key);
            }
        }
        let oldest = epoch.saturating_sub(self.config.keep_epochs);
        let old = self.store.scan(Keyspace::EpochScores, &KeyRange::all().until(&oldest.to_be_bytes()), RETAIN_STEP)?;
        for (key, _) in old.items {
            write.delete(Keyspace::EpochScores, key);
        }
        self.store.commit(write).await.map(drop)
    }

    async fn own_pages(&self, epoch: u64, account: &mut Account) -> Result<(), StoreError> {
        let mut range = Some(pages::of_epoch(epoch));
        while let Some(r) = range {
            let found = self.store.scan(Keyspace::Batches, &r, SCAN)?;
            for (_, value) in found.items {
                account.anything = true;
                let page = match pages::batch_from(&value) {
                    Some(batch) => pages::get(self.store.as_ref(), batch.root.as_ref())?,
                    None => None,
                };
                match page {
                    Some((_, page)) => self.count(account, &page, epoch, &self.net.local().hotkey, &mut Vec::new()),
                    None => account.incomplete = true,
                }
                tokio::task::yield_now().await;
            }
            range = found.next;
        }
        Ok(())
    }

    async fn others(&self, epoch: u64, account: &mut Account) -> Result<(), StoreError> {
        // Those who could not be asked are not asked again in this round.
        let mut away: Vec<Hotkey> = Vec::new();
        let mut places: BTreeMap<Hotkey, (u64, u64)> = BTreeMap::new();
        let mut range = Some(roots_of(epoch));
        while let Some(r) = range {
            let found = self.store.scan(Keyspace::Heard, &r, SCAN)?;
            for (_, value) in found.items {
                let Ok(raw) = pb::Signed::decode(value) else { continue };
                let (Ok(author), Ok(batch)) = (Hotkey::try_from(&raw.signer[..]), Batch::decode(&raw.payload)) else {
                    continue;
                };
                account.anything = true;
                let place = places.entry(author).or_insert((batch.sequence, batch.sequence));
                *place = (place.0.min(batch.sequence), place.1.max(batch.sequence));
                let mut shown = account.validators.remove(&author).unwrap_or_else(|| nothing_of(author));
                shown.heard += 1;
                match self.page(&author, &batch, &mut away).await? {
                    Ok(page) => {
                        shown.read += 1;
                        account.fetched.push(pages::foreign_key(author.as_ref(), &batch.root));
                        let mut counted = Vec::new();
                        self.count(account, &page, epoch, &author, &mut counted);
                        shown.verdicts += counted.len() as u64;
                        self.draw_again(&author, &counted, &mut shown)?;
                    }
                    Err(NoPage::Away) => account.incomplete = true,
                    Err(NoPage::Bad) => shown.bad += 1,
                }
                account.validators.insert(author, shown);
                tokio::task::yield_now().await;
            }
            range = found.next;
        }
        for (author, shown) in &mut account.validators {
            let (first, last) = places.get(author).copied().unwrap_or_default();
            shown.missing = (last - first + 1).saturating_sub(shown.heard);
            account.incomplete |= shown.missing > 0;
            shown.draws = draws(&committed(self.store.as_ref(), epoch, author)?);
        }
        Ok(())
    }

    /// The page behind a root: kept from an earlier try, or fetched from its author and kept.
    async fn page(
        &self,
        author: &Hotkey,
        batch: &Batch,
        away: &mut Vec<Hotkey>,
    ) -> Result<Result<pb::Page, NoPage>, StoreError> {
        let key = pages::foreign_key(author.as_ref(), &batch.root);
        if let Some((_, page)) = pages::get(self.store.as_ref(), &key)? {
            return Ok(Ok(page));
        }
        let node = self.directory.snapshot().validators.get(author).copied();
        let Some(node) = node.filter(|_| !away.contains(author) && batch.network == self.network) else {
            return Ok(Err(NoPage::Away));
        };
        let request = pb::request::Kind::Page(pb::PageRequest { root: batch.root.into() });
        let answer = tokio::time::timeout(PAGE_WITHIN, self.net.request_one(node, request)).await;
        let Ok(Ok(pb::response::Kind::Page(page))) = answer else {
            away.push(*author);
            return Ok(Err(NoPage::Away));
        };
        let entries: Vec<Vec<u8>> = page.entries.iter().map(prost::Message::encode_to_vec).collect();
        let whole = entries.len() == batch.count as usize
            && merkle::root(entries.iter().map(Vec::as_slice)) == Some(batch.root);
        if !whole {
            tracing::warn!(validator = %author, "showed a page that is not what its root says");
            return Ok(Err(NoPage::Bad));
        }
        let mut write = WriteBatch::new();
        pages::put(&mut write, key, batch.epoch, &page);
        self.store.commit(write).await?;
        Ok(Ok(page))
    }

    /// Counts an author's own verdicts on a page.
    fn count(&self, account: &mut Account, page: &pb::Page, epoch: u64, author: &Hotkey, counted: &mut Vec<Verdict>) {
        for (signer, verdict) in verdicts(page, epoch) {
            if signer != *author {
                continue;
            }
            if account.tally.jobs() >= self.config.jobs_max {
                account.incomplete = true;
                return;
            }
            account.tally.add(&verdict);
            counted.push(verdict);
        }
    }

    /// Draws the audits of verdicts again, with the secret of the epoch in which each was drawn.
    fn draw_again(&self, author: &Hotkey, counted: &[Verdict], shown: &mut ValidatorPages) -> Result<(), StoreError> {
        let mut secrets: BTreeMap<u64, Option<EpochSecret>> = BTreeMap::new();
        for verdict in counted {
            let secret = match secrets.entry(verdict.epoch) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    let known = committed(self.store.as_ref(), verdict.epoch, author)?;
                    let secret = known.secret.filter(|_| !known.broken);
                    place.insert(secret.map(|secret| EpochSecret { epoch: verdict.epoch, secret }))
                }
            };
            if let Some(secret) = secret {
                shown.neglected += recheck(secret, verdict, FLOOR).len() as u64;
            }
        }
        Ok(())
    }
}

fn draws(known: &super::books::Committed) -> Draws {
    match (known.broken, known.secret) {
        (true, _) => Draws::Broken,
        (false, Some(_)) => Draws::Checked,
        (false, None) => Draws::Unrevealed,
    }
}

fn nothing_of(hotkey: Hotkey) -> ValidatorPages {
    ValidatorPages { hotkey, heard: 0, missing: 0, read: 0, bad: 0, verdicts: 0, draws: Draws::default(), neglected: 0 }
}
