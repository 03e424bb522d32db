"""A DICOM node that finds liver lesions on CT and answers with DICOM SEG and a structured report.

A CT comes in at the left door and findings leave at the right. A room knows the room it receives
from, never the one it hands to. Two wings on one foundation: the science wing never hears of the
network, the store or the config file; the plumbing wing never hears of voxels. They meet only in
`assembly` and in `worker`, through `analysis`. The import map (a test holds it against the code: a
room imports exactly what stands right of its arrow):

  the foundation
    errors                 <-
    uids                   <-
    log                    <-
    durable                <-
    damage                 <-
    criteria               <-
    settings               <-
    limits                 <-
    processors             <-
    selection_rules        <-
    series_rules           <-
  products               <-
  config                 <- criteria errors limits products selection_rules series_rules settings

  the science wing, in the order of the flow
    volume                 <- uids
    regrid                 <- volume
    nifti                  <- damage errors volume
    slice_geometry         <- errors series_rules volume
    native_image           <-
    pixel_decoding         <- damage
    series                 <- damage errors native_image pixel_decoding processors series_rules slice_geometry uids volume
    contrast_phase         <-
    candidate              <- contrast_phase native_image series slice_geometry
    stacks                 <- candidate errors series series_rules slice_geometry
    series_score           <- candidate contrast_phase selection_rules
    selection              <- candidate errors selection_rules series series_score stacks
    task_identity          <-
    models                 <- errors task_identity
    pipelines.options      <- errors
    pipelines              <- contrast_phase errors pipelines.options uids volume
    pipelines.plans        <- errors
    pipelines.device       <- errors processors
    pipelines.sliding_window <- errors pipelines.device
    pipelines.resampling   <- pipelines.device
    pipelines.preprocessing <-
    pipelines.nnunet       <- errors models pipelines pipelines.device pipelines.plans pipelines.preprocessing pipelines.resampling pipelines.sliding_window volume
    pipelines.demo         <- errors models pipelines pipelines.device pipelines.nnunet volume
    pipelines.morphology   <-
    pipelines.part         <- volume
    pipelines.salsa_steps  <- errors pipelines.morphology pipelines.part volume
    pipelines.salsa_upstream <- volume
    pipelines.scan         <- errors pipelines.device volume
    pipelines.totalseg     <- errors models pipelines pipelines.device pipelines.nnunet pipelines.scan volume
    pipelines.phase        <- contrast_phase errors
    pipelines.totalsegmentator <- errors models pipelines pipelines.device pipelines.nnunet pipelines.phase pipelines.scan pipelines.totalseg volume
    pipelines.salsa        <- errors models pipelines pipelines.device pipelines.nnunet pipelines.part pipelines.salsa_steps pipelines.salsa_upstream pipelines.totalseg regrid volume
  pipelines.given_masks  <- errors nifti pipelines regrid volume
    upright                <- native_image pipelines volume
    findings               <- contrast_phase criteria errors pipelines uids volume
    codes                  <-
    owners                 <- errors series
    dicom_result           <- errors owners pipelines series uids volume
    dicom_seg              <- codes dicom_result errors findings pipelines uids volume
    dicom_sr               <- codes criteria dicom_result dicom_seg errors findings owners pipelines uids
  dicom_viewer_sr        <- codes dicom_result dicom_sr findings volume
    picture                <- codes dicom_result findings volume
    page                   <- codes dicom_result dicom_sr findings picture pipelines volume
  dicom_sc               <- dicom_result errors pipelines uids
  dicom_pdf              <- codes dicom_result pipelines uids
  dicom_ko               <- codes dicom_result errors findings uids
  guards                 <- findings limits pipelines volume
  placement              <- codes dicom_result dicom_seg errors findings owners series slice_geometry uids
  analysis               <- contrast_phase criteria dicom_ko dicom_pdf dicom_result dicom_sc dicom_seg dicom_sr dicom_viewer_sr errors findings guards limits page picture pipelines placement products series series_rules uids upright volume

  the plumbing wing
    store_states           <-
    store_columns          <-
    store_rows             <- store_columns store_states
    store_prepared         <- errors
    store_connection       <- errors store_prepared
    store_transaction      <- errors store_prepared store_rows
    store_queries          <- errors store_rows store_transaction
    store_arrivals         <- errors store_connection store_prepared store_queries store_rows store_transaction
    store_clock            <- store_connection store_queries store_rows store_transaction
    store_commitments      <- errors store_columns store_connection store_queries store_transaction
    store_deliveries       <- errors store_connection store_queries store_rows store_transaction
    store_interventions    <- errors store_connection store_queries store_rows store_transaction
    store_quarantine       <- store_connection store_queries store_rows store_transaction
    store_looks            <- errors store_connection store_queries store_rows store_transaction
    store_search           <- store_queries store_rows store_transaction
    store_switches         <- store_columns store_connection store_queries store_transaction
    store_reviews          <- errors store_connection store_queries store_rows store_transaction
    store_forgetting       <- errors store_commitments store_connection store_interventions store_queries store_reviews store_rows store_transaction
    store_phases           <- store_connection store_queries store_rows store_transaction
    store_proofs           <- errors store_connection store_queries store_rows store_transaction
  store                  <- store_arrivals store_clock store_commitments store_connection store_deliveries store_forgetting store_interventions store_looks store_phases store_proofs store_quarantine store_queries store_reviews store_rows store_search store_switches store_transaction
    association            <-
    notes                  <- errors store
    instance_header        <- damage
    transcoding            <- damage
    intake                 <- durable errors instance_header log notes store transcoding
    storage_classes        <- instance_header
    fast_receive           <- association instance_header intake
    pacs_count             <- association settings
    commitment             <- errors requestor settings store
    tls                    <- errors settings
    listener               <- association commitment errors fast_receive instance_header intake notes settings storage_classes store tls
    requestor              <- association errors settings tls
    destinations           <- errors settings store
    outgoing               <- durable errors store uids
    way_dicom              <- association errors outgoing requestor settings
    way_folder             <- durable errors outgoing settings
    way_web                <- errors outgoing settings tls
    ways                   <- errors outgoing settings way_dicom way_folder way_web
    claimed                <- errors settings store
    delivery               <- claimed destinations errors log outgoing settings store ways
    fetch                  <- errors instance_header intake outgoing requestor settings way_dicom way_web
    verification           <- claimed commitment destinations errors log outgoing requestor settings store ways

  where they meet
    evidence               <- candidate pacs_count store
    disk_trouble           <-
    assembly               <- candidate contrast_phase disk_trouble errors evidence log pacs_count selection selection_rules series series_rules settings stacks store uids
    failures               <- errors
    ahead                  <- errors
  worker                 <- ahead analysis assembly config dicom_result durable errors failures log pipelines store
  process_memory         <-
  supervisor             <- config errors failures process_memory store

  on top
    preflight              <- config errors model_fetch models pipelines settings
    overview               <- failures store
    selftest               <- config durable errors loopback overview phantom settings store
    node_lock              <- config errors store
    reserve                <-
    doctor                 <- config errors loopback node_lock overview preflight reserve settings store ways
    audit                  <- errors store
    backup                 <- audit durable errors store
    retention              <- durable errors overview settings store
    integrity              <- durable store
    audit_message          <- audit durable errors settings tls
    web                    <- errors settings
    monitoring             <- errors overview reserve store web
    notification           <- durable errors settings store
    node                   <- assembly audit audit_message commitment config delivery disk_trouble durable errors failures integrity listener log monitoring node_lock notification pacs_count preflight reserve retention store supervisor verification web
    table                  <-
    console                <- table
    dicom_ct               <- errors uids volume
    offline                <- analysis candidate config criteria dicom_ct dicom_result errors findings log nifti picture pipelines selection series stacks uids upright volume
    anatomy                <- volume
    phantom                <- anatomy dicom_ct nifti uids volume
    loopback               <- association errors
    demo                   <- codes config console criteria dicom_result errors findings loopback overview phantom picture pipelines pipelines.given_masks series store
    options                <- config
    model_cards            <- errors models
    model_manifest         <- durable errors model_cards models
    model_source           <- errors
    model_trial            <- errors models phantom pipelines.nnunet volume
    model_import           <- errors model_cards model_manifest model_source model_trial models task_identity
    model_fetch            <- errors model_cards model_import model_manifest models
    cli_fetch              <- audit config console errors fetch intake notes options settings store
    cli_review             <- audit config console options store
    cli_queue              <- audit config console options store
    cli_series             <- assembly audit candidate config console errors nifti options preflight series series_rules stacks store upright
    cli_upkeep             <- audit backup config console doctor errors integrity node_lock options preflight selftest store
    cli_studies            <- audit config console durable errors options overview reserve retention store
    cli_quarantine         <- config console options overview store
    cli_models             <- config console errors model_cards model_fetch model_import model_manifest models options
    cases                  <- candidate errors nifti selection selection_rules series series_rules stacks volume
    film                   <- dicom_result findings picture volume
    batch                  <- analysis cases criteria durable errors film findings guards limits log models nifti pipelines series_rules uids upright volume
    scripting              <- batch cases config criteria dicom_result dicom_seg errors findings limits nifti pipelines preflight series
    cli_batch              <- batch cases config console criteria errors options pipelines preflight settings
  cli                    <- assembly audit cli_batch cli_fetch cli_models cli_quarantine cli_queue cli_review cli_series cli_studies cli_upkeep config console demo durable errors log nifti node offline options preflight settings store ways worker
    __main__               <- cli
"""  # noqa: E501 - one room, one line

__version__ = "0.1.0"
